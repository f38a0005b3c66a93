"""The whole server, as `python -m server` builds it, on a tiny real model: every answer is the oracle's."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from fastapi import FastAPI

from crma.generate import Generation, generate
from crma.injection import plan_rows
from crma.prompts import chat_format
from crma.pull import BaseModel
from crma.selection import AdapterSelection
from crma.store import AdapterStore, TaskEntry

from .test_generate import events

PROMPT = "Which chapter covers Cholera?"
ADMIN = {"Authorization": "Bearer admin"}
VARIANTS = {
    "base": {"task": None, "crma": False},
    "task": {"task": "medical", "crma": False},
    "crma": {"task": None, "crma": True},
    "task+crma": {"task": "medical", "crma": True},
}


@dataclass
class Served:
    """A ready app, its store, and the two parts of it that a test looks into."""

    app: FastAPI
    client: httpx.AsyncClient
    store: AdapterStore

    def __post_init__(self) -> None:
        self.engine = self.app.state.frontend.engine
        self.pool = self.app.state.frontend.registry.pool

    async def ask(self, prompt: str = PROMPT, **body: Any) -> httpx.Response:
        return await self.client.post("/generate", json={"prompt": prompt, "max_tokens": 8, **body})

    async def text(self, **body: Any) -> str:
        response = await self.ask(**body)
        assert response.status_code == 200, response.text
        return response.json()["text"]

    async def error(self, **body: Any) -> tuple[int, str]:
        response = await self.ask(**body)
        return response.status_code, response.json()["error"]["code"]

    async def refresh(self) -> None:
        await self.app.state.frontend.registry.refresh()

    async def admin(self, task: str, action: str) -> int:
        return (await self.client.post(f"/adapters/{task}/{action}", headers=ADMIN)).status_code

    async def metric(self, name: str) -> float:
        text = (await self.client.get("/metrics")).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def settled(self) -> None:
        """A later request is answered as ever, and nothing is held any more."""
        assert await self.text(seed=1) == text_of(oracle(self.store))
        assert self.pool.num_pins() == 0
        self.engine.engine.check_integrity()
        self.pool.check_integrity()


def oracle(store: AdapterStore, task: str | None = None, crma: bool = False, prompt: str = PROMPT) -> Generation:
    """What the tiny model gives alone, greedy, with what the store serves."""
    entry = None if task is None else store.task(*task.split("@"))
    backbone = store.backbone() if crma else None
    loras = {entry.digest: entry.load().to("cpu", torch.float32)} if entry else {}
    backbones = {backbone.digest: backbone.load().folded("cpu", torch.float32)} if backbone else {}
    selection = AdapterSelection(entry and entry.digest, backbone and backbone.digest)
    format_ = tiny.FORMAT if entry else chat_format(tiny.tokenizer())
    ids = format_.encode(tiny.tokenizer(), prompt)
    stop = (tiny.tokenizer().eos_token_id,)
    return generate(tiny.injection(), ids, plan_rows([selection], loras, backbones), max_tokens=8, stop_ids=stop)


def text_of(generation: Generation) -> str:
    return tiny.tokenizer().decode(generation.token_ids, skip_special_tokens=True)


@pytest.fixture
def store(base: BaseModel, tmp_path: Path) -> AdapterStore:
    """medical, trained with CRMA; legal, without; their backbone."""
    store = AdapterStore(tmp_path / "store")
    backbone = tiny.publish_backbone(store, base)
    tiny.publish(store, base, "medical", 1, under=backbone.digest)
    tiny.publish(store, base, "legal", 2, under=None)
    return store


@pytest.fixture
async def serve(base: BaseModel, store: AdapterStore) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Served:
            app = await stack.enter_async_context(tiny.serving(base, store.root, **options))
            http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
            return Served(app, await stack.enter_async_context(http), store)

        yield start


@pytest.fixture
async def served(serve: Any) -> Served:
    return await serve()


@pytest.fixture
def gate(served: Served) -> threading.Event:
    """Forward passes wait for it; `gate.reached` says that one does."""
    gate, real = threading.Event(), served.engine.engine.runner.run
    gate.reached = threading.Event()

    def run(batch: Any) -> torch.Tensor:
        gate.reached.set()
        assert gate.wait(10)
        return real(batch)

    served.engine.engine.runner.run = run
    return gate


async def test_every_variant_is_the_oracles_and_says_what_answered(served: Served, base: BaseModel) -> None:
    """All at once, so that they share batches."""
    expected = {name: oracle(served.store, **body) for name, body in VARIANTS.items()}
    assert len({each.token_ids for each in expected.values()}) == 4
    answers = await asyncio.gather(*(served.ask(**VARIANTS[name], logprobs=True) for name in VARIANTS for _ in "ab"))
    medical, backbone = served.store.task("medical").digest, served.store.backbone()
    for name, response in zip([name for name in VARIANTS for _ in "ab"], answers, strict=True):
        body = response.json()
        assert body["text"] == text_of(expected[name])
        assert body["logprobs"] == pytest.approx(expected[name].logprobs, abs=1e-4)
        assert body["finish_reason"] == expected[name].finish_reason
        assert body["usage"]["completion_tokens"] == len(expected[name].token_ids)
        used = body["provenance"]
        assert (used["base"], used["dtype"]) == (base.digest, "float32")
        assert used["task"] == (medical if "task" in name else None)
        assert used["crma"] == (backbone.digest if "crma" in name else None)
    assert await served.text(task="medical") == text_of(expected["task+crma"]), "on, as it was trained"
    assert await served.text(task="legal") == text_of(oracle(served.store, "legal")), "off, as it was trained"


async def test_crma_off_is_a_server_without_crma(serve: Any) -> None:
    """To the last bit of the log-probabilities."""
    served, without = await serve(), await serve(load_backbone=False)
    for task in (None, "medical"):
        body = {"task": task, "crma": False, "logprobs": True}
        ours, theirs = [(await each.ask(**body)).json() for each in (served, without)]
        assert (ours["text"], ours["logprobs"]) == (theirs["text"], theirs["logprobs"])
    assert await without.error(task="medical") == (409, "no_backbone")


async def test_a_stream_is_the_whole_answer_in_pieces(served: Served) -> None:
    for n in (1, 2):
        body = {"task": "medical", "temperature": 1.0, "seed": 5, "n": n, "logprobs": True}
        whole = (await served.ask(**body)).json()
        *tokens, (_, done) = events((await served.ask(**body, stream=True)).text)
        for index, choice in enumerate(whole.get("choices", [whole])):
            mine = [data for _, data in tokens if data["index"] == index]
            assert "".join(data["text"] for data in mine) == choice["text"]
            assert [data["logprob"] for data in mine if "logprob" in data] == choice["logprobs"]
            assert (done.get("choices") or [done])[index]["finish_reason"] == choice["finish_reason"]
        assert (done["usage"], done["provenance"]) == (whole["usage"], whole["provenance"])


async def test_a_seed_repeats_an_answer_and_n_counts_on_from_it(served: Served) -> None:
    sampled = {"task": "medical", "temperature": 2.0}
    two = (await served.ask(**sampled, n=2, seed=5)).json()["choices"]
    assert [c["text"] for c in two] == [await served.text(**sampled, seed=seed) for seed in (5, 6)]
    assert two[0]["text"] != two[1]["text"]
    drawn = (await served.ask(**sampled)).json()
    assert await served.text(**sampled, seed=drawn["provenance"]["seed"]) == drawn["text"]


async def test_an_ablation_is_the_generations_it_compares(served: Served) -> None:
    """The answers asked for are those of task+crma, which so has them all right."""
    prompts = ["One?", "Two?", "Three?"]
    with_crma, without = ([text_of(oracle(served.store, "medical", on, p)) for p in prompts] for on in (True, False))
    ask = {"id": "", "task": "medical", "question": "", "answers": []}
    questions = [ask | {"id": p, "question": p, "answers": [a]} for p, a in zip(prompts, with_crma, strict=True)]
    body = {"questions": questions, "variants": ["task+crma", "task", "base", "crma"], "max_tokens": 8}
    report = (await served.client.post("/ablation", json=body)).json()
    assert [report["variants"][name]["accuracy"] for name in body["variants"]] == [1.0, 0.0, 0.0, 0.0]
    assert [item["outputs"]["task"]["text"] for item in report["items"]] == without
    assert [item["outputs"]["task+crma"]["text"] for item in report["items"]] == with_crma
    assert (report["comparisons"][0]["difference"], report["comparisons"][0]["mcnemar"]["gained"]) == (1.0, 3)
    medical, backbone = served.store.task("medical").digest, served.store.backbone()
    used = report["provenance"]
    assert (used["tasks"], used["crma"]) == ({"medical": medical}, backbone.digest)
    assert await served.metric('crma_last_ablation_accuracy{variant="task+crma"}') == 1.0
    assert served.pool.num_pins() == 0


@pytest.mark.parametrize(("repeat", "runs"), [(False, 1), (True, 2)])
async def test_a_null_run_has_no_flips(served: Served, repeat: bool, runs: int) -> None:
    questions = [{"id": str(i), "task": "medical", "question": f"{i}?", "answers": ["x"]} for i in range(4)]
    before = served.engine.stats().prompt_tokens
    body = {"questions": questions, "variants": ["task+crma", "task+crma"], "max_tokens": 4, "repeat": repeat}
    report = (await served.client.post("/ablation", json=body)).json()
    assert report["comparisons"][0]["flips"] == {"gained": [], "lost": []}
    assert all(i["outputs"]["task+crma"] == i["outputs"]["task+crma#2"] for i in report["items"])
    prompts = sum(len(tiny.FORMAT.encode(tiny.tokenizer(), q["question"])) for q in questions)
    assert served.engine.stats().prompt_tokens - before == runs * prompts, "repeat runs it, and only repeat"


def corrupt(entry: TaskEntry) -> None:
    file = entry.path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_corrupt_adapter_is_refused_and_the_others_serve(serve: Any, store: AdapterStore, stream: bool) -> None:
    """Found when the server starts, or, if its file changes later, when it is loaded."""
    corrupt(store.task("legal"))
    served = await serve()
    assert await served.metric("crma_adapter_verification_failures_total") == 1
    corrupt(store.task("medical"))
    for task in ("legal", "medical", "medical"):
        assert await served.error(task=task, stream=stream) == (409, "digest_mismatch")
    corrupt(store.task("medical"))  # the same bit again: repaired
    assert await served.text(task="medical") == text_of(oracle(store, "medical", crma=True))
    await served.settled()


async def test_adapters_that_do_not_belong_are_refused(served: Served, base: BaseModel) -> None:
    other = replace(base, digest="sha256:" + "b" * 64)
    tiny.publish(served.store, other, "foreign", 3, under=None)
    tiny.publish(served.store, base, "huge", 4, under=None, scale=1e30)
    await served.refresh()
    assert await served.error(task="foreign") == (409, "base_mismatch")
    assert await served.error(task="legal", crma=True) == (409, "lineage_mismatch")
    assert await served.error(task="medical@v2") == (404, "not_found")
    assert await served.error(prompt="x" * 600) == (422, "prompt_too_long")
    assert await served.error(task="huge", logprobs=True) == (500, "generation_failed")
    await served.settled()


async def test_a_new_version_serves_at_once_and_the_old_one_by_its_number(served: Served, base: BaseModel) -> None:
    old = await served.text(task="medical")
    entry = tiny.publish(served.store, base, "medical", 7, under=served.store.backbone().digest)
    assert await served.text(task="medical") == old, "not before the store is looked at"
    await served.refresh()
    answer = (await served.ask(task="medical")).json()
    assert answer["provenance"]["task"] == entry.digest
    assert answer["text"] == text_of(oracle(served.store, "medical", crma=True)) != old
    assert await served.text(task="medical@v1") == old


async def test_an_administrator_loads_pins_and_unloads_but_nothing_in_use(
    served: Served, gate: threading.Event
) -> None:
    async def resident() -> dict[str, bool]:
        return {task["name"]: task["resident"] for task in (await served.client.get("/adapters")).json()["tasks"]}

    assert await resident() == {"legal": False, "medical": False}
    assert [await served.admin("medical", action) for action in ("load", "pin", "pin", "unload")] == [
        200,
        200,
        200,
        409,
    ]
    assert await resident() == {"legal": False, "medical": True}
    asked = asyncio.create_task(served.ask(task="medical"))
    assert await asyncio.to_thread(gate.reached.wait, 10)
    assert [await served.admin("medical", action) for action in ("unpin", "unload")] == [200, 409]
    gate.set()
    assert (await asked).json()["text"] == text_of(oracle(served.store, "medical", crma=True))
    await served.settled()
    assert [await served.admin("medical", action) for action in ("unload", "unload")] == [200, 200]
    assert await resident() == {"legal": False, "medical": False}
    assert (await served.client.post("/adapters/medical/load")).status_code == 401
    assert await served.text(task="medical") == text_of(oracle(served.store, "medical", crma=True))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_leaves_nothing_behind(
    served: Served, gate: threading.Event, stream: bool
) -> None:
    body = json.dumps({"prompt": "Hi", "task": "medical", "max_tokens": 200, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        assert await asyncio.to_thread(gate.reached.wait, 10)
        assert served.pool.num_pins() == 2
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": "", "scheme": "http"}
    scope |= {"headers": [(b"content-type", b"application/json")], "server": ("test", 80), "client": ("test", 1)}
    await asyncio.wait_for(served.app(scope, receive, send), 10)
    gate.set()
    await served.settled()
    assert served.engine.stats().generation_tokens < 100
    aborted = 'crma_request_success_total{adapter="medical",crma="on",finished_reason="abort"}'
    assert await served.metric(aborted) == 1


async def test_metrics_move_with_what_happens(served: Served) -> None:
    names = ["prompt_tokens_total", "generation_tokens_total", "engine_steps_total", "adapter_load_seconds_count"]
    before = [await served.metric(f"crma_{name}") for name in names]
    usage = (await served.ask(task="medical")).json()["usage"]
    moved = [await served.metric(f"crma_{name}") - old for name, old in zip(names, before, strict=True)]
    tokens = usage["completion_tokens"]
    assert moved == [usage["prompt_tokens"], tokens, moved[2], 2]
    assert tokens <= moved[2] <= tokens + 1
    labels = 'adapter="medical",crma="on"'
    assert await served.metric(f"crma_e2e_request_latency_seconds_count{{{labels}}}") == 1
    assert await served.metric('crma_adapter_resident{adapter="medical"}') == 1
    assert await served.metric("crma_num_requests_running") == 0
