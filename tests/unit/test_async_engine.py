"""server.engine.async_engine: whoever comes, waits, leaves or fails, the others go on and nothing is left behind.

Every wait is for an event, or for a later request: commands reach the engine in order.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch

from crma.errors import DigestMismatch, NotFound
from crma.generate import generate
from crma.lora import Lora
from crma.selection import BASE, AdapterSelection
from server.engine.adapter_pool import AdapterPool
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.request import (
    EngineStopped,
    FinishReason,
    PromptTooLong,
    QueueFull,
    Request,
    RequestOutput,
    SamplingParams,
)

ADAPTERS = tiny.adapters(tiny.injection())
BOTH = AdapterSelection("task-0", "crma-0")
SLOW = AdapterSelection("slow")
PROMPT = (5, 9, 40)


async def read(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


async def happens(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10), "it does not happen"


@dataclass
class Gate:
    """Forward passes and the load of "slow" wait for it; `at_step` and `at_load` say that one does."""

    open: threading.Event = field(default_factory=threading.Event)
    at_step: threading.Event = field(default_factory=threading.Event)
    at_load: threading.Event = field(default_factory=threading.Event)
    failures: list[Exception] = field(default_factory=list)

    def load(self) -> Lora:
        self.at_load.set()
        assert self.open.wait(10)
        adapter = ADAPTERS["task-1"]
        assert isinstance(adapter, Lora)
        return adapter


@dataclass
class Running:
    """A started engine and its parts."""

    engine: AsyncEngine
    core: Engine
    pool: AdapterPool
    gate: Gate

    async def outputs(self, request: Request) -> list[RequestOutput]:
        return await read(self.engine.submit(request))

    async def settled(self) -> None:
        """All that was asked for is done: a later request has been answered, and the books balance."""
        self.gate.open.set()
        ended = await asyncio.wait_for(self.outputs(ask("later")), 10)
        assert tokens(ended) == generate(tiny.injection(), PROMPT, max_tokens=4).token_ids
        self.core.check_integrity()
        self.pool.check_integrity()
        assert self.pool.num_pins() == 0
        assert not self.core.scheduler.has_work()
        assert not self.engine._streams


def ask(
    name: str,
    selection: AdapterSelection = BASE,
    *,
    prompt: tuple[int, ...] = PROMPT,
    deadline: float | None = None,
    **sampling: Any,
) -> Request:
    sampled = SamplingParams(**{"max_tokens": 4, **sampling})
    return Request(name, prompt, sampling=sampled, selection=selection, deadline=deadline)


def tokens(outputs: list[RequestOutput]) -> tuple[int, ...]:
    return sum((output.token_ids for output in outputs), ())


def reason(outputs: list[RequestOutput]) -> tuple[FinishReason | None, str | None]:
    return outputs[-1].finish_reason, outputs[-1].error


@pytest.fixture
async def running() -> AsyncIterator[Callable[..., Running]]:
    """Starts an engine with the gate open unless told otherwise; at the end all of them must still settle and stop."""
    started: list[Running] = []

    def start(*, max_queue: int = 8, gate_open: bool = True, **limits: int) -> Running:
        core, pool = tiny.make_engine(tiny.injection(), ADAPTERS, **{"max_num_seqs": 2, **limits})
        gate, real = Gate(), core.runner.run

        def run(batch: Any) -> torch.Tensor:
            gate.at_step.set()
            assert gate.open.wait(10)
            if gate.failures:
                raise gate.failures.pop()
            return real(batch)

        core.runner.run = run
        pool.register("slow", gate.load)
        if gate_open:
            gate.open.set()
        started.append(Running(AsyncEngine(core, pool, max_queue), core, pool, gate))
        started[-1].engine.start()
        return started[-1]

    yield start
    for each in started:
        if not each.engine._stopped:
            await each.settled()
            await asyncio.wait_for(each.engine.stop(0), 10)


async def test_many_at_once_each_get_their_own(running: Any) -> None:
    served = running(max_queue=40)
    requests = [ask(str(i), BOTH if i % 2 else BASE, n=1 + i % 3, temperature=1.0, seed=i) for i in range(20)]
    answers = await asyncio.gather(*(served.outputs(request) for request in requests))
    for request, outputs in zip(requests, answers, strict=True):
        assert {o.request_id for o in outputs} == {request.id}
        assert [o.finish_reason is not None for o in outputs].count(True) == request.sampling.n
        again = await served.outputs(request)
        for index in range(request.sampling.n):
            mine, theirs = (tokens([o for o in run if o.index == index]) for run in (outputs, again))
            assert mine == theirs
    stats = served.engine.stats()
    assert stats.resident == ("task-0", "crma-0")
    assert (stats.adapter_loads, stats.num_requests_running, stats.kv_cache_usage) == (2, 0, 0)


async def test_aborted_before_its_first_output(running: Any) -> None:
    """Before it is read at all; while its adapter loads; while it waits for a slot."""
    served = running(gate_open=False, max_num_seqs=1)
    unread = served.engine.submit(ask("unread", n=2))
    served.engine.abort("unread")
    blocking = asyncio.create_task(served.outputs(ask("blocking")))
    await happens(served.gate.at_step)
    waiting = served.engine.submit(ask("waiting", BOTH))
    read_waiting = asyncio.ensure_future(anext(waiting))
    loading = asyncio.create_task(served.outputs(ask("loading", SLOW)))
    await happens(served.gate.at_load)
    for name in ("waiting", "loading", "waiting", "nobody"):
        served.engine.abort(name)
    served.gate.open.set()
    outputs = await read(unread)
    assert [(o.index, o.finish_reason) for o in outputs] == [(i, FinishReason.ABORT) for i in range(2)]
    assert (await read_waiting).finish_reason is FinishReason.ABORT
    assert await read(waiting) == []
    assert reason(await loading) == (FinishReason.ABORT, None)
    assert reason(await blocking) == (FinishReason.LENGTH, None)


async def test_closed_early_frees_its_slot_and_pins(running: Any) -> None:
    served = running()
    async with aclosing(served.engine.submit(ask("left", BOTH, max_tokens=300))) as outputs:
        assert (await anext(outputs)).token_ids
        assert served.pool.num_pins() == 2
    await served.settled()


async def test_the_client_goes_while_its_adapter_loads(running: Any) -> None:
    served = running(gate_open=False)
    unpinned = threading.Event()
    real = served.pool.unpin_selection
    served.pool.unpin_selection = lambda selection: (real(selection), unpinned.set())[0]
    gone = asyncio.create_task(served.outputs(ask("gone", SLOW)))
    await happens(served.gate.at_load)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    served.gate.open.set()
    await happens(unpinned)
    assert served.pool.resident() == ("slow",)


async def test_one_request_over_the_queue_is_refused_and_takes_nothing(running: Any) -> None:
    served = running(gate_open=False, max_num_seqs=1, max_queue=2)
    taken = [asyncio.create_task(served.outputs(ask(str(i)))) for i in range(3)]
    await happens(served.gate.at_step)
    with pytest.raises(QueueFull) as caught:
        served.engine.submit(ask("over"))
    assert (caught.value.limit, caught.value.retry_after >= 1) == (2, True)
    served.gate.open.set()
    assert [reason(outputs)[0] for outputs in await asyncio.gather(*taken)] == [FinishReason.LENGTH] * 3
    assert reason(await served.outputs(ask("over")))[0] is FinishReason.LENGTH


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(0, 1), (8, 3), (11, 1)])
async def test_a_prompt_that_cannot_fit_is_refused(running: Any, num_prompt: int, max_tokens: int) -> None:
    served = running(max_model_len=10)
    with pytest.raises(PromptTooLong):
        served.engine.submit(ask("long", prompt=(5,) * num_prompt, max_tokens=max_tokens))
    assert reason(await served.outputs(ask("fits", prompt=(5,) * 8, max_tokens=2)))[0] is FinishReason.LENGTH


async def test_a_deadline_is_an_abort_that_says_so(running: Any) -> None:
    served = running(gate_open=False)
    now = [0.0]
    served.core.clock = lambda: now[0]
    late = asyncio.create_task(served.outputs(ask("late", BOTH, deadline=1.0, max_tokens=300)))
    await happens(served.gate.at_step)
    now[0] = 1.0
    served.gate.open.set()
    assert reason(await late) == (FinishReason.ABORT, "deadline")


async def test_a_failing_step_ends_its_own_requests_only(running: Any) -> None:
    served = running()
    served.gate.failures.append(RuntimeError("out of memory"))
    assert reason(await served.outputs(ask("unlucky", BOTH, n=2))) == (FinishReason.ERROR, "the step failed")
    assert reason(await served.outputs(ask("next", BOTH)))[0] is FinishReason.LENGTH


@pytest.mark.parametrize(("error", "digest"), [(DigestMismatch("bad", field="x"), "bad"), (NotFound, "unknown")])
async def test_an_adapter_that_cannot_be_loaded_is_an_error_before_any_output(
    running: Any, error: Any, digest: str
) -> None:
    served = running()

    def load() -> Lora:
        raise error

    if digest == "bad":
        served.pool.register(digest, load)
    for selection in (AdapterSelection(digest, "crma-0"), AdapterSelection("task-0", digest)):
        with pytest.raises(error if isinstance(error, type) else type(error)):
            await served.outputs(ask("refused", selection))
    await served.settled()


async def test_an_unforeseen_failure_of_the_engine_leaves_nobody_waiting(running: Any) -> None:
    served = running(gate_open=False)
    hit = [asyncio.create_task(served.outputs(ask(name, BOTH))) for name in "ab"]
    await happens(served.gate.at_step)

    def broken() -> None:
        raise AssertionError("the books do not balance")

    served.core.scheduler.schedule = broken
    served.gate.open.set()
    for outputs in await asyncio.wait_for(asyncio.gather(*hit), 10):
        assert reason(outputs)[0] is FinishReason.ERROR
    with pytest.raises(EngineStopped):
        served.engine.submit(ask("later"))
    await asyncio.wait_for(served.engine.stop(0), 10)


async def test_stopping_lets_what_runs_finish_and_takes_nothing_new(running: Any) -> None:
    served = running(gate_open=False)
    taken = asyncio.create_task(served.outputs(ask("taken", BOTH, max_tokens=40)))
    stopping = asyncio.create_task(served.engine.stop(10))
    await happens(served.gate.at_step)
    with pytest.raises(EngineStopped):
        served.engine.submit(ask("late"))
    served.gate.open.set()
    assert reason(await taken)[0] is FinishReason.LENGTH
    await asyncio.wait_for(stopping, 10)
    with pytest.raises(EngineStopped):
        served.engine.submit(ask("later"))
    assert (served.pool.num_pins(), served.core.scheduler.has_work()) == (0, False)
    served.core.check_integrity()


async def test_stopping_aborts_what_is_left_when_the_time_is_up(running: Any) -> None:
    """What runs, what waits, what loads, and what nobody has begun to read."""
    served = running(gate_open=False, max_num_seqs=1)
    requests = [ask("runs", BOTH, max_tokens=300), ask("waits", max_tokens=300), ask("loads", SLOW)]
    taken = [asyncio.create_task(served.outputs(request)) for request in requests]
    unread = served.engine.submit(ask("unread", BOTH))
    await happens(served.gate.at_step)
    stopping = asyncio.create_task(served.engine.stop(0))
    await happens(served.gate.at_load)
    served.gate.open.set()
    await asyncio.wait_for(stopping, 10)
    taken.append(asyncio.create_task(read(unread)))
    for outputs in await asyncio.wait_for(asyncio.gather(*taken), 10):
        assert reason(outputs) == (FinishReason.ABORT, None)
    assert (served.pool.num_pins(), served.core.scheduler.has_work()) == (0, False)
    served.core.check_integrity()
