"""The whole server, as `python -m server` builds it, on a tiny real model: every answer is the one
without it.
"""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass
class Real(Served):
    """One that serves the tiny model; and the same adapters without a server, `alone`."""

    alone: Alone

    def __post_init__(self) -> None:
        self.registry, self.store = self.app.state.frontend.registry, self.alone.store

    def oracle(self, task: str | None = None, crma: bool = False) -> str:
        """The model's answer alone, greedy, with what the store serves."""
        variant = AdapterSelection(task, "on" if crma else None).variant
        return self.alone.answers(
            task or "none", self.alone.plan(variant, task or "none"), [PROMPT], max_tokens=8
        )[0]

    async def generate(self, **body: Any) -> httpx.Response:
        return await super().generate(**{"prompt": PROMPT, "max_tokens": 8, **body})

    async def ask(self, **body: Any) -> dict[str, Any]:
        response = await self.generate(**body)
        assert response.status_code == 200, response.text
        return response.json()

    async def measured(self, *names: str) -> list[float]:
        text = await self.metrics()
        found = [
            re.search(rf"^crma_{re.escape(name)} (\S+)$", text, re.MULTILINE) for name in names
        ]
        return [float(each[1]) if each else 0.0 for each in found]

    async def settled(self) -> None:
        """A later request is answered as ever, and nothing is held any more."""
        assert (await self.ask())["text"] == self.oracle()
        assert self.engine.pool.num_users() == 0
        self.engine.engine.check_integrity()
        self.engine.pool.check_integrity()


@asynccontextmanager
async def serve(base: BaseModel, store: AdapterStore, **options: Any) -> AsyncIterator[Real]:
    async with tiny.serving(base, store.root, **options) as app:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        yield Real(
            app,
            client,
            app.state.frontend.engine,
            Alone(base, store, device="cpu", dtype="float32"),
        )


@pytest.fixture
async def served(base: BaseModel, store: AdapterStore) -> AsyncIterator[Real]:
    async with serve(base, store) as served:
        yield served


@pytest.fixture
def gate(served: Real) -> tuple[threading.Event, threading.Event]:
    """(reached, open): the first is set when a forward pass waits for the second."""
    reached, opened, run = threading.Event(), threading.Event(), served.engine.engine.runner.run
    served.engine.engine.runner.run = lambda *step: (reached.set(), opened.wait(10), run(*step))[2]
    return reached, opened


async def test_every_variant_is_the_oracles_and_says_what_answered(
    served: Real, base: BaseModel
) -> None:
    """All at once, so that they share batches."""
    variants = [(task, crma) for task in (None, "medical") for crma in (False, True)] * 2
    expected = {variant: served.oracle(*variant) for variant in variants}
    assert len(set(expected.values())) == 4
    counters = ["prompt_tokens_total", "generation_tokens_total", "adapter_load_seconds_count"]
    before = await served.measured(*counters)
    answers = await asyncio.gather(*(served.ask(task=task, crma=crma) for task, crma in variants))
    medical, backbone = served.store.task("medical"), served.store.backbone()
    for (task, crma), body in zip(variants, answers, strict=True):
        used = body["provenance"]
        assert body["text"] == expected[task, crma]
        assert (used["base"], used["dtype"]) == (base.digest, "float32")
        assert (used["task"], used["crma"]) == (
            task and medical.digest,
            backbone.digest if crma else None,
        )
    usages = [
        [body["usage"][f"{kind}_tokens"] for body in answers] for kind in ("prompt", "completion")
    ]
    moved = [new - old for old, new in zip(before, await served.measured(*counters), strict=True)]
    assert moved == [sum(usages[0]), sum(usages[1]), 2]
    labelled = 'e2e_request_latency_seconds_count{adapter="medical",crma="on"}'
    assert await served.measured(labelled, "num_requests_running") == [2, 0]
    assert (await served.ask(task="medical"))["text"] == expected["medical", True], (
        "on, as it was trained"
    )
    assert (await served.ask(task="legal"))["text"] == served.oracle("legal"), (
        "off, as it was trained"
    )


async def test_crma_off_is_a_server_without_crma(served: Real, base: BaseModel) -> None:
    """To the last bit of the log-probabilities."""
    async with serve(base, served.store, load_backbone=False) as without:
        for task in (None, "medical"):
            ours, theirs = [
                await each.ask(task=task, crma=False, logprobs=True) for each in (served, without)
            ]
            assert (ours["text"], ours["logprobs"]) == (theirs["text"], theirs["logprobs"])
        assert await without.error(task="medical") == (409, "no_backbone")


async def test_n_counts_on_from_the_seed_and_a_seed_that_was_drawn_gives_the_answer_again(
    served: Real,
) -> None:
    sampled = {"task": "medical", "temperature": 2.0}
    for index, choice in enumerate((await served.ask(**sampled, seed=5, n=2))["choices"]):
        alone = await served.ask(**sampled, seed=5 + index)
        assert (alone["text"], alone["usage"]["cached_tokens"]) == (choice["text"], 16), (
            "the prompt's one full block"
        )
    drawn = await served.ask(**sampled)
    assert (await served.ask(**sampled, seed=drawn["provenance"]["seed"]))["text"] == drawn["text"]


async def test_a_top_k_that_no_float_can_hold_keeps_the_whole_vocabulary(served: Real) -> None:
    """It ended the engine: an OverflowError in the sampler, which no step expects."""
    sampled = {"task": "medical", "temperature": 2.0, "seed": 5}
    endless, whole = await asyncio.gather(
        served.ask(**sampled, top_k=10**309), served.ask(**sampled)
    )
    assert endless["text"] == whole["text"]
    await served.settled()


async def test_an_ablation_is_the_one_without_a_server(served: Real) -> None:
    """The answers asked for are those of task+crma, which so has them all right."""
    prompts, variants = ["One?", "Two?", "Three?"], ["task+crma", "task"]
    right = served.alone.answers(
        "medical", served.alone.plan("task+crma", "medical"), prompts, max_tokens=8
    )
    asked = [
        {"id": p, "task": "medical", "question": p, "answers": [a]}
        for p, a in zip(prompts, right, strict=True)
    ]
    body = {"questions": asked, "variants": variants, "max_tokens": 8, "seed": 7}
    report = (await served.client.post("/ablation", json=body)).json()
    alone = ablate(
        served.alone,
        inline_question_set(asked),
        AblationSettings(tuple(variants), max_tokens=8, seed=7),
        note=lambda _: None,
    )
    for part in ("question_set", "variants", "comparisons", "items"):
        assert report[part] == alone[part]
    assert [report["variants"][name]["accuracy"] for name in variants] == [1.0, 0.0]
    used, backbone = report["provenance"], served.store.backbone()
    assert (used["tasks"], used["crma"]) == (
        {"medical": served.store.task("medical").digest},
        backbone.digest,
    )
    assert await served.measured('last_ablation_accuracy{variant="task+crma"}') == [1.0]
    await served.settled()


@pytest.mark.parametrize("scorer", ["choice", "choice_normalised", "perplexity"])
async def test_likelihoods_are_those_without_a_server_and_share_the_prompt(
    served: Real, scorer: str
) -> None:
    choices = ["other", "free", "the", "café", "3 €"]
    asked = [
        {
            "id": p,
            "task": "medical",
            "question": p * 40,
            "answers": choices[1:2],
            "choices": choices,
        }
        for p in "abc"
    ]
    variants = ["task+crma", "task"]
    names = ("prompt_tokens_total", "prefix_cache_hits_total")
    before = await served.measured(*names)
    body = {"questions": asked, "variants": variants, "scorer": scorer, "seed": 7}
    report = (await served.client.post("/ablation", json=body)).json()
    asks, hits = [new - old for old, new in zip(before, await served.measured(*names), strict=True)]
    alone = ablate(
        served.alone,
        inline_question_set(asked),
        AblationSettings(tuple(variants), scorer=scorer, seed=7),
        note=lambda _: None,
    )
    for ours, theirs in zip(report["items"], alone["items"], strict=True):
        for name in variants:
            expected = theirs["outputs"][name]
            assert ours["outputs"][name] == {
                key: pytest.approx(value, abs=1e-4) if key.startswith("logprob") else value
                for key, value in expected.items()
            }
    assert hits > asks / 3 if scorer != "perplexity" else hits == 0
    await served.settled()


async def test_a_corrupt_adapter_is_refused_and_the_others_serve(
    base: BaseModel, store: AdapterStore
) -> None:
    """Found when the server starts, or, if its file changes later, when it is loaded."""
    weights = {
        name: store.task(name).path / "adapter_model.safetensors" for name in ("legal", "medical")
    }
    tiny.flip_bit(weights["legal"])
    async with serve(base, store) as served:
        assert await served.measured("adapter_verification_failures_total") == [1]
        tiny.flip_bit(weights["medical"])
        for task, stream in (("legal", False), ("medical", False), ("medical", True)):
            assert await served.error(task=task, stream=stream) == (409, "digest_mismatch")
        tiny.flip_bit(weights["medical"])  # the same bit again: repaired
        assert (await served.ask(task="medical"))["text"] == served.oracle("medical", True)
        await served.settled()


async def test_what_does_not_belong_is_refused(served: Real, base: BaseModel) -> None:
    elsewhere = replace(base, digest="sha256:" + "b" * 64)
    tiny.publish(served.store, elsewhere, "foreign", 3)
    tiny.publish(served.store, elsewhere, "foreign-shape", 3, family="gpt_neox")
    tiny.publish(served.store, base, "huge", 4, lora=tiny.overflowing())
    await served.registry.refresh()
    assert await served.error(task="foreign") == (409, "base_mismatch")
    assert await served.error(task="foreign-shape") == (409, "base_mismatch")
    assert await served.error(task="huge", logprobs=True) == (500, "generation_failed")
    await served.settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_leaves_nothing_behind(
    served: Real, gate: Any, stream: bool
) -> None:
    reached, opened = gate
    body = json.dumps(
        {"prompt": "Hi", "task": "medical", "max_tokens": 200, "stream": stream}
    ).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        assert await asyncio.to_thread(reached.wait, 10)
        assert served.engine.pool.num_users() == 2
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = SCOPE | {
        "asgi": {"spec_version": "2.3"},
        "headers": [(b"content-type", b"application/json")],
    }
    await asyncio.wait_for(served.app(scope, receive, send), 10)
    opened.set()
    await served.settled()
    assert served.engine.stats().generation_tokens < 100
    assert await served.measured(
        'request_success_total{adapter="medical",crma="on",finished_reason="abort"}'
    ) == [1]
