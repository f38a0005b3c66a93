"""server.engine.native.async_engine: whoever comes, waits, leaves or fails, the others go on and
nothing is left behind.

Every wait is for an event, or for a later request: commands reach the engine in order.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import tiny
from scripted_engine import TINY
from tiny import PROMPT, ask

from crma.core.selection import AdapterSelection
from crma.models.reference import generate
from server.engine.errors import EngineStopped, PromptTooLong, QueueFull
from server.engine.native.async_engine import AsyncEngine
from server.engine.request import FinishReason, Request, RequestOutput

ADAPTERS = tiny.adapters(tiny.injection())
BOTH = AdapterSelection("task-0", "crma-0")
SLOW = AdapterSelection("slow")


async def read(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


async def happens(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10), "it does not happen"


class Running:
    """A started engine. Forward passes, and the load of "slow", wait for `go`; `at_step` and
    `at_load` say that one does. A forward pass raises what is in `failures`."""

    def __init__(self, max_queue: int = 8, go: bool = True, **limits: int) -> None:
        self.core, self.pool = tiny.make_engine(
            tiny.injection(), ADAPTERS, **{"max_num_seqs": 2, **limits}
        )
        self.go, self.at_step, self.at_load = (threading.Event() for _ in range(3))
        self.failures: list[Exception] = []
        run = self.core.runner.run
        self.core.runner.run = lambda *step: self.wait(self.at_step) or run(*step)
        self.pool.register("slow", lambda: self.wait(self.at_load) or ADAPTERS["task-1"])
        self.engine = AsyncEngine(self.core, TINY, max_queue)
        if go:
            self.go.set()

    def wait(self, reached: threading.Event) -> None:
        reached.set()
        assert self.go.wait(10)
        if self.failures:
            raise self.failures.pop()

    async def outputs(self, request: Request) -> list[RequestOutput]:
        return await read(self.engine.submit(request))

    def take(self, *requests: Request) -> list[asyncio.Task[list[RequestOutput]]]:
        return [asyncio.create_task(self.outputs(request)) for request in requests]

    async def settled(self) -> None:
        """All that was asked for is done: a later request has been answered, and nothing is held."""
        self.go.set()
        ended = await asyncio.wait_for(self.outputs(ask("later")), 10)
        assert tokens(ended) == generate(tiny.injection(), PROMPT, max_tokens=6).token_ids
        self.check_empty()

    def check_empty(self) -> None:
        self.core.check_integrity()
        self.pool.check_integrity()
        assert (self.pool.num_users(), self.core.scheduler.unfinished(), self.engine._streams) == (
            0,
            [],
            {},
        )


def tokens(outputs: list[RequestOutput]) -> tuple[int, ...]:
    return sum((output.token_ids for output in outputs), ())


def reason(outputs: list[RequestOutput]) -> tuple[FinishReason | None, str | None]:
    return outputs[-1].finish_reason, outputs[-1].error


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Running]]:
    """`Running`; at the end each must still answer, hold nothing, and stop."""
    started: list[Running] = []

    def start(**options: Any) -> Running:
        started.append(Running(**options))
        return started[-1]

    yield start
    for each in started:
        if not each.engine._stopped:
            await each.settled()
            await asyncio.wait_for(each.engine.close(), 10)


@pytest.mark.parametrize("stopped", [False, True])
async def test_aborted_or_stopped_wherever_it_is(start: Any, stopped: bool) -> None:
    """While its adapter loads; while it waits for a slot; before it is read at all.

    Stopping ends what runs as well.
    """
    served = start(go=False, max_num_seqs=1)
    taken = served.take(ask("loads", SLOW))
    await happens(served.at_load)
    taken += served.take(ask("runs", max_tokens=300), ask("waits"))
    unread = served.engine.submit(ask("unread", BOTH, n=2))
    await happens(served.at_step)
    if stopped:
        ending = asyncio.create_task(served.engine.close())
        await happens(served.at_step)  # again: the stopping begins meanwhile
        with pytest.raises(EngineStopped):
            served.engine.submit(ask("late"))
    for name in () if stopped else ("waits", "loads", "waits", "unread", "nobody"):
        served.engine.abort(name)
    served.go.set()
    if stopped:
        await asyncio.wait_for(ending, 10)
        served.check_empty()
    assert [(o.index, o.finish_reason) for o in await read(unread)] == [
        (i, FinishReason.ABORT) for i in range(2)
    ]
    runs = FinishReason.ABORT if stopped else FinishReason.LENGTH
    ends = [FinishReason.ABORT, runs, FinishReason.ABORT]
    assert [reason(await each) for each in taken] == [(end, None) for end in ends]


async def test_what_cannot_be_taken_is_refused_at_once_and_takes_nothing(start: Any) -> None:
    served = start(go=False, max_num_seqs=1, max_queue=2, max_model_len=10)
    for num_prompt, max_tokens in ((0, 1), (8, 3), (11, 1)):
        with pytest.raises(PromptTooLong):
            served.engine.submit(ask("long", prompt=(5,) * num_prompt, max_tokens=max_tokens))
    taken = served.take(*(ask(str(i), prompt=(5,) * 8, max_tokens=2) for i in range(3)))
    await happens(served.at_step)
    with pytest.raises(
        QueueFull, check=lambda error: error.allowed == 2 and error.retry_after >= 1
    ):
        served.engine.submit(ask("over"))
    served.go.set()
    assert [reason(outputs)[0] for outputs in await asyncio.gather(*taken)] == [
        FinishReason.LENGTH
    ] * 3


async def test_a_deadline_is_an_abort_that_says_so_running_or_waiting(start: Any) -> None:
    served, now = start(go=False, max_num_seqs=1), [0.0]
    served.core.clock = lambda: now[0]
    late = [ask(name, BOTH, deadline=1.0, max_tokens=300) for name in "ab"]
    taken = served.take(*late, ask("in time", deadline=9.0))
    await happens(served.at_step)
    now[0] = 1.0
    served.go.set()
    ends = [reason(outputs) for outputs in await asyncio.gather(*taken)]
    assert ends == [(FinishReason.ABORT, "deadline")] * 2 + [(FinishReason.LENGTH, None)]


async def test_a_failing_step_ends_its_own_sequences_only(start: Any) -> None:
    served = start(go=False)
    taken = served.take(ask("unlucky", n=2))
    await happens(served.at_step)
    taken += served.take(ask("waits", BOTH))
    served.failures.append(RuntimeError("out of memory"))
    served.go.set()
    unlucky, waited = await asyncio.gather(*taken)
    assert [(o.finish_reason, o.error) for o in unlucky] == [
        (FinishReason.ERROR, "the step failed")
    ] * 2
    assert (reason(waited)[0], len(tokens(waited))) == (FinishReason.LENGTH, 6)


async def test_an_unforeseen_failure_of_the_engine_leaves_nobody_waiting(start: Any) -> None:
    served = start(go=False)
    taken = served.take(ask("runs", n=2), ask("waits", BOTH))
    await happens(served.at_step)
    served.core.scheduler.schedule = None
    served.go.set()
    for outputs in await asyncio.wait_for(asyncio.gather(*taken), 10):
        assert reason(outputs)[0] is FinishReason.ERROR
    with pytest.raises(EngineStopped):
        served.engine.submit(ask("later"))
    assert served.engine.stats().has_failed
    await asyncio.wait_for(served.engine.close(), 10)
