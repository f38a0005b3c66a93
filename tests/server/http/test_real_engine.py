"""The whole server, as `python -m server` builds it, on a tiny real model.

Every answer must equal the one that the same adapters give without a server.
"""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import api_keys
import httpx
import pytest
import tiny
from api import SCOPE, Served

from crma.core.selection import AdapterSelection
from crma.evaluation.ablation import AblationSettings
from crma.evaluation.offline import Served as Alone
from crma.evaluation.offline import ablate
from crma.evaluation.question_set import inline_question_set
from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore

PROMPT = "Which chapter covers Cholera?"
VARIANTS = [(None, False), (None, True), ("medical", False), ("medical", True)]  # task, crma


@dataclass
class Real(Served):
    """A running app on the tiny model; `alone` is the same model and store without a server."""

    alone: Alone

    def __post_init__(self) -> None:
        self.registry = self.app.state.frontend.registry
        self.store = self.alone.store

    def oracle(self, task: str | None = None, crma: bool = False) -> str:
        """The greedy answer to PROMPT without a server."""
        name = task or "none"
        variant = AdapterSelection(task, "on" if crma else None).variant
        plan = self.alone.plan(variant, name)
        return self.alone.answers(name, plan, [PROMPT], max_tokens=8)[0]

    async def generate(self, **body: Any) -> httpx.Response:
        return await super().generate(**{"prompt": PROMPT, "max_tokens": 8, **body})

    async def answer(self, **body: Any) -> dict[str, Any]:
        """The answer of a request that must succeed."""
        response = await self.generate(**body)
        assert response.status_code == 200, response.text
        return response.json()

    async def ablation(self, **body: Any) -> dict[str, Any]:
        return (await self.client.post("/ablation", json=body)).json()

    async def measured(self, *names: str) -> list[float]:
        """The values of metrics, given with their labels and without the prefix; 0 if absent."""
        text = await self.metrics()
        values = []
        for name in names:
            found = re.search(rf"^crma_{re.escape(name)} (\S+)$", text, re.MULTILINE)
            values.append(float(found[1]) if found else 0.0)
        return values

    async def settled(self) -> None:
        """Check that a later request gets its answer and that nothing is held."""
        assert (await self.answer())["text"] == self.oracle()
        assert self.engine.pool.num_users() == 0
        self.engine.engine.check_integrity()
        self.engine.pool.check_integrity()


@asynccontextmanager
async def serve(base: BaseModel, store: AdapterStore, **options: Any) -> AsyncIterator[Real]:
    async with tiny.serving(base, store.root, **options) as app:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        alone = Alone(base, store, device="cpu", dtype="float32")
        yield Real(app, client, app.state.frontend.engine, AsyncExitStack(), alone)


@pytest.fixture
async def served(base: BaseModel, store: AdapterStore) -> AsyncIterator[Real]:
    async with serve(base, store) as served:
        yield served


@pytest.fixture
def gate(served: Real) -> tuple[threading.Event, threading.Event]:
    """(reached, open): forward passes set the first and wait for the second."""
    reached, opened = threading.Event(), threading.Event()
    runner = served.engine.engine.runner
    forward = runner.run

    def run(*step: Any) -> Any:
        reached.set()
        assert opened.wait(10)
        return forward(*step)

    runner.run = run
    return reached, opened


def increases(before: list[float], after: list[float]) -> list[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


async def test_every_variant_answers_as_it_does_alone_and_says_which_adapters_it_used(
    served: Real, base: BaseModel
) -> None:
    """All at once, so that they share batches."""
    expected = {variant: served.oracle(*variant) for variant in VARIANTS}
    assert len(set(expected.values())) == 4
    variants = VARIANTS * 2
    asked = [served.answer(task=task, crma=crma) for task, crma in variants]
    answers = await asyncio.gather(*asked)
    medical, backbone = served.store.task("medical"), served.store.backbone()
    for (task, crma), body in zip(variants, answers, strict=True):
        used = body["provenance"]
        assert body["text"] == expected[task, crma]
        assert used["base"] == base.digest
        assert used["dtype"] == "float32"
        assert used["task"] == (medical.digest if task else None)
        assert used["crma"] == (backbone.digest if crma else None)


async def test_metrics_count_the_tokens_loads_and_requests_of_a_batch(served: Real) -> None:
    counters = ["prompt_tokens_total", "generation_tokens_total", "adapter_load_seconds_count"]
    before = await served.measured(*counters)
    asked = [served.answer(task=task, crma=crma) for task, crma in VARIANTS * 2]
    answers = await asyncio.gather(*asked)
    prompt_tokens = sum(body["usage"]["prompt_tokens"] for body in answers)
    completion_tokens = sum(body["usage"]["completion_tokens"] for body in answers)
    moved = increases(before, await served.measured(*counters))
    assert moved == [prompt_tokens, completion_tokens, 2]
    labelled = 'e2e_request_latency_seconds_count{adapter="medical",crma="on"}'
    assert await served.measured(labelled, "num_requests_running") == [2, 0]


async def test_crma_is_by_default_as_the_task_was_trained(served: Real) -> None:
    assert (await served.answer(task="medical"))["text"] == served.oracle("medical", True)
    assert (await served.answer(task="legal"))["text"] == served.oracle("legal", False)


async def test_crma_off_equals_a_server_without_crma_to_the_last_bit(
    served: Real, base: BaseModel
) -> None:
    async with serve(base, served.store, load_backbone=False) as without:
        for task in (None, "medical"):
            ours = await served.answer(task=task, crma=False, logprobs=True)
            theirs = await without.answer(task=task, crma=False, logprobs=True)
            assert ours["text"] == theirs["text"]
            assert ours["logprobs"] == theirs["logprobs"]
        assert await without.error(task="medical") == (409, "no_backbone")


async def test_choice_i_of_n_is_the_answer_of_seed_plus_i(served: Real) -> None:
    sampled = {"task": "medical", "temperature": 2.0}
    choices = (await served.answer(**sampled, seed=5, n=2))["choices"]
    for index, choice in enumerate(choices):
        alone = await served.answer(**sampled, seed=5 + index)
        assert alone["text"] == choice["text"]
        assert alone["usage"]["cached_tokens"] == 16, "the prompt's one full block"


async def test_a_seed_drawn_by_the_server_gives_the_same_answer_again(served: Real) -> None:
    sampled = {"task": "medical", "temperature": 2.0}
    drawn = await served.answer(**sampled)
    again = await served.answer(**sampled, seed=drawn["provenance"]["seed"])
    assert again["text"] == drawn["text"]


async def test_a_top_k_that_no_float_can_hold_keeps_the_whole_vocabulary(served: Real) -> None:
    """An OverflowError in the sampler would end the engine: no step expects one."""
    sampled = {"task": "medical", "temperature": 2.0, "seed": 5}
    endless, whole = await asyncio.gather(
        served.answer(**sampled, top_k=10**309), served.answer(**sampled)
    )
    assert endless["text"] == whole["text"]
    await served.settled()


async def test_an_ablation_equals_the_one_without_a_server(served: Real) -> None:
    """The right answers are those of task+crma, so its accuracy is 1."""
    prompts = ["One?", "Two?", "Three?"]
    variants = ["task+crma", "task"]
    plan = served.alone.plan("task+crma", "medical")
    right = served.alone.answers("medical", plan, prompts, max_tokens=8)
    questions = []
    for prompt, answer in zip(prompts, right, strict=True):
        questions.append({"id": prompt, "task": "medical", "question": prompt, "answers": [answer]})
    options = {"max_tokens": 8, "seed": 7}
    report = await served.ablation(questions=questions, variants=variants, **options)
    asked = inline_question_set(questions)
    settings = AblationSettings(tuple(variants), **options)
    alone = ablate(served.alone, asked, settings, note=lambda _: None)
    for part in ("question_set", "variants", "comparisons", "items"):
        assert report[part] == alone[part]
    assert [report["variants"][name]["accuracy"] for name in variants] == [1.0, 0.0]
    used = report["provenance"]
    assert used["tasks"] == {"medical": served.store.task("medical").digest}
    assert used["crma"] == served.store.backbone().digest
    assert await served.measured('last_ablation_accuracy{variant="task+crma"}') == [1.0]
    await served.settled()


@pytest.mark.parametrize("scorer", ["choice", "choice_normalised", "perplexity"])
async def test_likelihoods_equal_those_without_a_server_and_choices_share_their_prompt(
    served: Real, scorer: str
) -> None:
    choices = ["other", "free", "the", "café", "3 €"]
    questions = []
    for name in "abc":
        question = {"id": name, "task": "medical", "question": name * 40}
        questions.append({**question, "answers": ["free"], "choices": choices})
    variants = ["task+crma", "task"]
    options = {"scorer": scorer, "seed": 7}
    counters = ("prompt_tokens_total", "prefix_cache_hits_total")
    before = await served.measured(*counters)
    report = await served.ablation(questions=questions, variants=variants, **options)
    num_tokens, num_hits = increases(before, await served.measured(*counters))
    asked = inline_question_set(questions)
    settings = AblationSettings(tuple(variants), **options)
    alone = ablate(served.alone, asked, settings, note=lambda _: None)
    for ours, theirs in zip(report["items"], alone["items"], strict=True):
        for variant in variants:
            assert ours["outputs"][variant] == about(theirs["outputs"][variant])
    if scorer == "perplexity":
        assert num_hits == 0
    else:
        assert num_hits > num_tokens / 3
    await served.settled()


def about(output: dict[str, Any]) -> dict[str, Any]:
    """An item's output to compare with: its log-probabilities within 1e-4, the rest exactly."""
    expected = dict(output)
    for key, value in output.items():
        if key.startswith("logprob"):
            expected[key] = pytest.approx(value, abs=1e-4)
    return expected


async def test_a_corrupt_adapter_is_refused_and_the_others_serve(
    base: BaseModel, store: AdapterStore
) -> None:
    """The damage is found when the server starts; if it comes later, when the adapter is loaded."""
    legal = store.task("legal").path / "adapter_model.safetensors"
    medical = store.task("medical").path / "adapter_model.safetensors"
    tiny.flip_bit(legal)
    async with serve(base, store) as served:
        assert await served.measured("adapter_verification_failures_total") == [1]
        tiny.flip_bit(medical)
        for task, stream in (("legal", False), ("medical", False), ("medical", True)):
            assert await served.error(task=task, stream=stream) == (409, "digest_mismatch")
        tiny.flip_bit(medical)  # repairs it
        assert (await served.answer(task="medical"))["text"] == served.oracle("medical", True)
        await served.settled()


async def test_adapters_of_another_base_and_adapters_that_overflow_are_refused(
    served: Real, base: BaseModel
) -> None:
    elsewhere = replace(base, digest="sha256:" + "b" * 64)
    tiny.publish(served.store, elsewhere, "foreign", 3)
    tiny.publish(served.store, elsewhere, "foreign-shape", 3, family="gpt_neox")
    tiny.publish(served.store, base, "huge", 4, lora=tiny.overflowing())
    await served.registry.refresh()
    assert await served.error(task="foreign") == (409, "base_mismatch")
    assert await served.error(task="foreign-shape") == (409, "base_mismatch")
    assert await served.error(task="huge", logprobs=True) == (500, "generation_failed")
    await served.settled()


async def test_requests_that_run_while_their_task_is_stopped_and_deleted_end_as_alone(
    served: Real, gate: Any
) -> None:
    """One has begun its first step. The other one waits, and loads its adapter afterwards."""
    reached, opened = gate
    admin = {"Authorization": "Bearer admin"}
    expected = served.oracle("legal")
    running = asyncio.create_task(served.answer(task="legal"))
    assert await asyncio.to_thread(reached.wait, 10)
    waiting = asyncio.create_task(served.answer(task="legal"))
    async with asyncio.timeout(10):
        while len(served.engine._streams) < 2:
            await asyncio.sleep(0.001)
    body = {"lora_name": "legal"}
    await served.client.post("/v1/unload_lora_adapter", json=body, headers=admin)
    response = await served.client.delete("/adapters/legal", headers=admin)
    assert response.json() == {"name": "legal", "deleted": ["v1"]}
    assert not (served.store.root / "tasks" / "legal").exists()
    assert await served.error(task="legal") == (404, "not_found")
    opened.set()
    for answer in await asyncio.gather(running, waiting):
        assert answer["text"] == expected
    await served.settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_leaves_nothing_behind(
    served: Real, gate: Any, stream: bool
) -> None:
    reached, opened = gate
    request = {"prompt": "Hi", "task": "medical", "max_tokens": 200, "stream": stream}
    body = json.dumps(request).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        assert await asyncio.to_thread(reached.wait, 10)
        assert served.engine.pool.num_users() == 2
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    headers = [(b"content-type", b"application/json")]
    scope = SCOPE | {"asgi": {"spec_version": "2.3"}, "headers": headers}
    await asyncio.wait_for(served.app(scope, receive, send), 10)
    opened.set()
    await served.settled()
    assert served.engine.stats().generation_tokens < 100
    aborted = 'request_success_total{adapter="medical",crma="on",finished_reason="abort"}'
    assert await served.measured(aborted) == [1]


async def test_a_streamed_echo_adds_up_to_the_whole_answer(served: Real) -> None:
    """With characters of several tokens in prompt and answer, and parts of them."""
    body: dict[str, Any] = {
        "model": "medical",
        "prompt": ["A 😀 B", [34, 248, 224]],
        "max_tokens": 9,
        "echo": True,
        "logprobs": 2,
        "temperature": 0,
    }
    whole = (await served.client.post("/v1/completions", json=body)).json()["choices"]
    response = await served.client.post("/v1/completions", json=body | {"stream": True})
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    for choice in whole:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            lists = [part["logprobs"][name] for part in own if part["logprobs"]]
            assert [*chain.from_iterable(lists)] == values
    await served.settled()


async def test_cached_tokens_do_not_tell_what_another_tenant_has_sent(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    """Whoever guessed another's prompt read the guess's success in `cached_tokens`."""
    file = tmp_path / "keys.json"
    callers = {"a": "acme", "b": "acme", "c": None}
    keys = {name: api_keys.add(file, name, tenant=tenant) for name, tenant in callers.items()}
    body = {"prompt": f"{PROMPT} " * 8, "max_tokens": 1, "raw": True}
    async with serve(base, store, keys_file=file) as served:

        async def cached_tokens(name: str) -> int:
            answer = await served.client.post("/generate", json=body, headers=keys[name])
            return answer.json()["usage"]["cached_tokens"]

        assert await cached_tokens("a") == 0
        assert await cached_tokens("c") == 0
        assert await cached_tokens("b") > 0
        assert await cached_tokens("a") > 0
        assert await cached_tokens("c") > 0
