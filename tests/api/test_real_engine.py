"""The whole server, as `python -m server` builds it, on a tiny real model: every answer is the oracle's."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from fastapi import FastAPI

from crma.generate import generate
from crma.injection import Plan
from crma.prompts import chat_format
from crma.pull import BaseModel
from crma.store import AdapterStore, TaskEntry

from .test_generate import events

PROMPT = "Which chapter covers Cholera?"
ADMIN = {"Authorization": "Bearer admin"}


@dataclass
class Served:
    """A ready app, its store, and the two parts of it that a test looks into."""

    app: FastAPI
    client: httpx.AsyncClient
    store: AdapterStore

    def __post_init__(self) -> None:
        self.engine = self.app.state.frontend.engine
        self.registry = self.app.state.frontend.registry

    async def post(self, **body: Any) -> httpx.Response:
        return await self.client.post("/generate", json={"prompt": PROMPT, "max_tokens": 8, **body})

    async def ask(self, **body: Any) -> dict[str, Any]:
        response = await self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()

    async def error(self, **body: Any) -> tuple[int, str]:
        response = await self.post(**body)
        return response.status_code, response.json()["error"]["code"]

    async def ablation(self, questions: list[tuple[str, str]], **body: Any) -> dict[str, Any]:
        asked = [{"id": q, "task": "medical", "question": q, "answers": [answer]} for q, answer in questions]
        return (await self.client.post("/ablation", json={"questions": asked, "max_tokens": 8, **body})).json()

    async def admin(self, *actions: str) -> list[int]:
        return [(await self.client.post(f"/adapters/medical/{a}", headers=ADMIN)).status_code for a in actions]

    async def metrics(self, *names: str) -> list[float]:
        text = (await self.client.get("/metrics")).text
        found = [re.search(rf"^crma_{re.escape(name)} (\S+)$", text, re.MULTILINE) for name in names]
        return [float(each[1]) if each else 0.0 for each in found]

    async def settled(self) -> None:
        """A later request is answered as ever, and nothing is held any more."""
        assert (await self.ask())["text"] == oracle(self.store).text
        assert self.registry.pool.num_pins() == 0
        self.engine.engine.check_integrity()
        self.registry.pool.check_integrity()


@dataclass(frozen=True)
class Oracle:
    """An answer of the model alone."""

    text: str
    logprobs: tuple[float, ...]
    finish_reason: str


def oracle(store: AdapterStore, task: str | None = None, crma: bool = False, prompt: str = PROMPT) -> Oracle:
    """What the tiny model gives alone, greedy, with what the store serves."""
    entry = store.task(task) if task else None
    backbone = store.backbone() if crma else None
    plan = Plan(
        [(None, entry.load().to("cpu", torch.float32))] if entry else [],
        [(None, backbone.load().folded("cpu", torch.float32))] if backbone else [],
    )
    tokenizer = tiny.tokenizer()
    ids = (tiny.FORMAT if entry else chat_format(tokenizer)).encode(tokenizer, prompt)
    alone = generate(tiny.injection(), ids, plan, max_tokens=8, stop_ids=(tokenizer.eos_token_id,))
    text = tokenizer.decode(alone.token_ids, skip_special_tokens=True)
    return Oracle(text, alone.logprobs, alone.finish_reason)


@pytest.fixture
def store(base: BaseModel, tmp_path: Path) -> AdapterStore:
    """medical, trained with CRMA; legal, without; their backbone."""
    store = AdapterStore(tmp_path / "store")
    backbone = tiny.publish_backbone(store, base)
    tiny.publish(store, base, "medical", 1, under=backbone.digest)
    tiny.publish(store, base, "legal", 2, under=None)
    return store


@asynccontextmanager
async def serve(base: BaseModel, store: AdapterStore, **options: Any) -> AsyncIterator[Served]:
    async with tiny.serving(base, store.root, **options) as app:
        yield Served(app, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test"), store)


@pytest.fixture
async def served(base: BaseModel, store: AdapterStore) -> AsyncIterator[Served]:
    async with serve(base, store) as served:
        yield served


@pytest.fixture
def gate(served: Served) -> tuple[threading.Event, threading.Event]:
    """(reached, open): the first is set when a forward pass waits for the second."""
    reached, opened, run = threading.Event(), threading.Event(), served.engine.engine.runner.run
    served.engine.engine.runner.run = lambda *step: (reached.set(), opened.wait(10), run(*step))[2]
    return reached, opened


async def test_every_variant_is_the_oracles_and_says_what_answered(served: Served, base: BaseModel) -> None:
    """All at once, so that they share batches."""
    variants = [(task, crma) for task in (None, "medical") for crma in (False, True)] * 2
    expected = {variant: oracle(served.store, *variant) for variant in variants}
    assert len({each.text for each in expected.values()}) == 4
    counters = ["prompt_tokens_total", "generation_tokens_total", "adapter_load_seconds_count"]
    before = await served.metrics(*counters)
    answers = await asyncio.gather(*(served.ask(task=task, crma=crma, logprobs=True) for task, crma in variants))
    medical, backbone = served.store.task("medical"), served.store.backbone()
    for (task, crma), body in zip(variants, answers, strict=True):
        alone = expected[task, crma]
        assert (body["text"], body["finish_reason"]) == (alone.text, alone.finish_reason)
        assert body["logprobs"] == pytest.approx(alone.logprobs, abs=1e-4)
        used = body["provenance"]
        assert (used["base"], used["dtype"]) == (base.digest, "float32")
        assert (used["task"], used["crma"]) == (task and medical.digest, backbone.digest if crma else None)
    usages = [[body["usage"][f"{kind}_tokens"] for body in answers] for kind in ("prompt", "completion")]
    moved = [new - old for old, new in zip(before, await served.metrics(*counters), strict=True)]
    assert moved == [sum(usages[0]), sum(usages[1]), 2]
    labelled = 'e2e_request_latency_seconds_count{adapter="medical",crma="on"}'
    assert await served.metrics(labelled, "num_requests_running") == [2, 0]
    assert (await served.ask(task="medical"))["text"] == expected["medical", True].text, "on, as it was trained"
    assert (await served.ask(task="legal"))["text"] == oracle(served.store, "legal").text, "off, as it was trained"


async def test_crma_off_is_a_server_without_crma(served: Served, base: BaseModel) -> None:
    """To the last bit of the log-probabilities."""
    async with serve(base, served.store, load_backbone=False) as without:
        for task in (None, "medical"):
            ours, theirs = [await each.ask(task=task, crma=False, logprobs=True) for each in (served, without)]
            assert (ours["text"], ours["logprobs"]) == (theirs["text"], theirs["logprobs"])
        assert await without.error(task="medical") == (409, "no_backbone")


async def test_a_stream_is_the_whole_answer_in_pieces_and_n_counts_on_from_the_seed(served: Served) -> None:
    sampled = {"task": "medical", "temperature": 2.0, "logprobs": True}
    whole = await served.ask(**sampled, seed=5, n=2)
    *tokens, (_, done) = events((await served.post(**sampled, seed=5, n=2, stream=True)).text)
    for index, choice in enumerate(whole["choices"]):
        mine = [data for _, data in tokens if data["index"] == index]
        assert "".join(data["text"] for data in mine) == choice["text"]
        assert [data["logprob"] for data in mine if "logprob" in data] == choice["logprobs"]
        assert done["choices"][index]["finish_reason"] == choice["finish_reason"]
        assert (await served.ask(**sampled, seed=5 + index))["text"] == choice["text"]
    cached = [body["usage"].pop("cached_tokens") for body in (whole, done)]
    assert cached == [0, 16], "the prompt's one full block"
    assert (done["usage"], done["provenance"]) == (whole["usage"], whole["provenance"])
    drawn = await served.ask(**sampled)
    assert (await served.ask(**sampled, seed=drawn["provenance"]["seed"]))["text"] == drawn["text"]


async def test_an_ablation_is_the_generations_it_compares(served: Served) -> None:
    """The answers asked for are those of task+crma, which so has them all right."""
    prompts = ["One?", "Two?", "Three?"]
    on, off = [[oracle(served.store, "medical", crma, p).text for p in prompts] for crma in (True, False)]
    variants = ["task+crma", "task", "base", "crma"]
    report = await served.ablation(list(zip(prompts, on, strict=True)), variants=variants)
    assert [report["variants"][name]["accuracy"] for name in variants] == [1.0, 0.0, 0.0, 0.0]
    assert [item["outputs"]["task"]["text"] for item in report["items"]] == off
    assert [item["outputs"]["task+crma"]["text"] for item in report["items"]] == on
    assert report["comparisons"][0]["mcnemar"]["gained"] == 3
    used, backbone = report["provenance"], served.store.backbone()
    assert (used["tasks"], used["crma"]) == ({"medical": served.store.task("medical").digest}, backbone.digest)
    assert await served.metrics('last_ablation_accuracy{variant="task+crma"}') == [1.0]
    await served.settled()


async def test_a_null_run_has_no_flips_and_runs_twice_only_if_told(served: Served) -> None:
    tokens = []
    for repeat in (False, True):
        before = served.engine.stats().prompt_tokens
        variants = ["task+crma", "task+crma"]
        report = await served.ablation([("One?", "x"), ("Two?", "x")], variants=variants, repeat=repeat)
        tokens.append(served.engine.stats().prompt_tokens - before)
        assert report["comparisons"][0]["flips"] == {"gained": [], "lost": []}
        assert all(i["outputs"]["task+crma"] == i["outputs"]["task+crma#2"] for i in report["items"])
    assert tokens[1] == 2 * tokens[0]


def corrupt(entry: TaskEntry) -> None:
    file = entry.path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


async def test_a_corrupt_adapter_is_refused_and_the_others_serve(base: BaseModel, store: AdapterStore) -> None:
    """Found when the server starts, or, if its file changes later, when it is loaded."""
    corrupt(store.task("legal"))
    async with serve(base, store) as served:
        assert await served.metrics("adapter_verification_failures_total") == [1]
        corrupt(store.task("medical"))
        for task, stream in (("legal", False), ("medical", False), ("medical", True)):
            assert await served.error(task=task, stream=stream) == (409, "digest_mismatch")
        corrupt(store.task("medical"))  # the same bit again: repaired
        assert (await served.ask(task="medical"))["text"] == oracle(store, "medical", True).text
        await served.settled()


async def test_what_does_not_belong_is_refused(served: Served, base: BaseModel) -> None:
    elsewhere = replace(base, digest="sha256:" + "b" * 64)
    tiny.publish(served.store, elsewhere, "foreign", 3, under=None)
    tiny.publish(served.store, elsewhere, "foreign-shape", 3, under=None, family="gpt_neox")
    tiny.publish(served.store, base, "huge", 4, under=None, scale=1e30)
    await served.registry.refresh()
    assert await served.error(task="foreign") == (409, "base_mismatch")
    assert await served.error(task="foreign-shape") == (409, "base_mismatch")
    assert await served.error(task="legal", crma=True) == (409, "lineage_mismatch")
    assert await served.error(task="medical@v2") == (404, "not_found")
    assert await served.error(prompt="x" * 600) == (422, "prompt_too_long")
    assert await served.error(task="huge", logprobs=True) == (500, "generation_failed")
    await served.settled()


async def test_a_new_version_serves_at_once_and_the_old_one_by_its_number(served: Served, base: BaseModel) -> None:
    old = (await served.ask(task="medical"))["text"]
    entry = tiny.publish(served.store, base, "medical", 7, under=served.store.backbone().digest)
    assert (await served.ask(task="medical"))["text"] == old, "not before the store is looked at"
    await served.registry.refresh()
    answer = await served.ask(task="medical")
    assert answer["provenance"]["task"] == entry.digest
    assert answer["text"] == oracle(served.store, "medical", True).text != old
    assert (await served.ask(task="medical@v1"))["text"] == old


async def test_an_administrator_loads_pins_and_unloads_but_nothing_in_use(served: Served, gate: Any) -> None:
    async def resident() -> list[str]:
        return [t["name"] for t in (await served.client.get("/adapters")).json()["tasks"] if t["resident"]]

    reached, opened = gate
    assert await resident() == []
    assert await served.admin("load", "pin", "pin", "unload") == [200, 200, 200, 409]
    assert await resident() == ["medical"]
    asked = asyncio.create_task(served.ask(task="medical"))
    assert await asyncio.to_thread(reached.wait, 10)
    assert await served.admin("unpin", "unload") == [200, 409]
    opened.set()
    assert (await asked)["text"] == oracle(served.store, "medical", True).text
    await served.settled()
    assert await served.admin("unload", "unload") == [200, 200]
    assert await resident() == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_leaves_nothing_behind(served: Served, gate: Any, stream: bool) -> None:
    reached, opened = gate
    body = json.dumps({"prompt": "Hi", "task": "medical", "max_tokens": 200, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        assert await asyncio.to_thread(reached.wait, 10)
        assert served.registry.pool.num_pins() == 2
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": "", "scheme": "http"}
    scope |= {"headers": [(b"content-type", b"application/json")], "server": ("test", 80), "client": ("test", 1)}
    await asyncio.wait_for(served.app(scope, receive, send), 10)
    opened.set()
    await served.settled()
    assert served.engine.stats().generation_tokens < 100
    assert await served.metrics('request_success_total{adapter="medical",crma="on",finished_reason="abort"}') == [1]
