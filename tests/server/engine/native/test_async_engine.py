"""server.engine.native.async_engine: requests are queued, aborted, timed out and failed separately.

Whatever happens to one request, the others continue, and nothing is held afterwards. Every wait is
for an event or for a later request: commands reach the engine in order.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
from scripted_engine import TINY
from tiny import PROMPT, ask

from crma.core.errors import InvalidAdapter
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
    """Wait for an event that another thread sets."""
    assert await asyncio.to_thread(event.wait, 10), "the event was not set"


class Running:
    """A started engine whose progress a test controls.

    Attributes:
        go: every forward pass, and the load of the adapter "slow", waits until it is set.
        at_step: set when a forward pass begins to wait.
        at_load: set when the load of "slow" begins to wait.
        failures: the next forward pass raises the first of them.
    """

    def __init__(self, max_queue: int = 8, go: bool = True, **limits: int) -> None:
        limits = {"max_num_seqs": 2, **limits}
        self.core, self.pool = tiny.make_engine(tiny.injection(), ADAPTERS, **limits)
        self.go = threading.Event()
        self.at_step = threading.Event()
        self.at_load = threading.Event()
        self.failures: list[Exception] = []
        forward = self.core.runner.run

        def run(*step: Any) -> Any:
            self._wait(self.at_step)
            return forward(*step)

        def load() -> Any:
            self._wait(self.at_load)
            return ADAPTERS["task-1"]

        self.core.runner.run = run
        self.pool.register("slow", load)
        self.engine = AsyncEngine(self.core, TINY, max_queue)
        if go:
            self.go.set()

    def _wait(self, reached: threading.Event) -> None:
        reached.set()
        assert self.go.wait(10)
        if self.failures:
            raise self.failures.pop(0)

    async def outputs(self, request: Request) -> list[RequestOutput]:
        return await read(self.engine.submit(request))

    def start(self, *requests: Request) -> list[asyncio.Task[list[RequestOutput]]]:
        return [asyncio.create_task(self.outputs(request)) for request in requests]

    async def settled(self) -> None:
        """Wait until a later request is answered, then check that nothing is held."""
        self.go.set()
        ended = await asyncio.wait_for(self.outputs(ask("later")), 10)
        assert tokens(ended) == generate(tiny.injection(), PROMPT, max_tokens=6).token_ids
        self.check_empty()

    def check_empty(self) -> None:
        self.core.check_integrity()
        self.pool.check_integrity()
        assert self.pool.num_users() == 0
        assert self.core.scheduler.unfinished() == []
        assert self.engine._streams == {}


def tokens(outputs: list[RequestOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def ending(outputs: list[RequestOutput]) -> tuple[FinishReason | None, str | None]:
    return outputs[-1].finish_reason, outputs[-1].error


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Running]]:
    """Makes `Running` engines. At the end each must still answer, hold nothing, and stop."""
    started: list[Running] = []

    def start(**options: Any) -> Running:
        started.append(Running(**options))
        return started[-1]

    yield start
    for each in started:
        if not each.engine._stopped:
            await each.settled()
            await asyncio.wait_for(each.engine.close(), 10)


async def begin_at_every_stage(
    served: Running,
) -> tuple[list[asyncio.Task[list[RequestOutput]]], AsyncIterator[RequestOutput]]:
    """Four requests: one's adapter loads, one runs, one waits for a slot; the last was not read.

    Returns:
        The tasks that collect the outputs of "loads", "runs" and "waits"; the stream of "unread".
    """
    tasks = served.start(ask("loads", SLOW))
    await happens(served.at_load)
    tasks += served.start(ask("runs", max_tokens=300), ask("waits"))
    unread = served.engine.submit(ask("unread", BOTH, n=2))
    await happens(served.at_step)
    return tasks, unread


async def check_unread_was_aborted(unread: AsyncIterator[RequestOutput]) -> None:
    outputs = await read(unread)
    assert [output.index for output in outputs] == [0, 1]
    assert [output.finish_reason for output in outputs] == [FinishReason.ABORT] * 2


async def test_stats_show_what_running_sequences_hold_and_nothing_afterwards(start: Any) -> None:
    served = start()
    stream = served.engine.submit(ask("long", BOTH, max_tokens=300))
    await anext(stream)
    stats = served.engine.stats()
    assert stats.adapter_uses == 2
    assert stats.kv_cache_usage > 0
    assert (stats.num_blocks, stats.block_size) == (64, 8)
    await stream.aclose()
    await served.settled()
    stats = served.engine.stats()
    assert (stats.adapter_uses, stats.kv_cache_usage) == (0, 0.0)


async def test_a_request_can_be_aborted_at_every_stage(start: Any) -> None:
    served = start(go=False, max_num_seqs=1)
    tasks, unread = await begin_at_every_stage(served)
    for name in ("waits", "loads", "waits", "unread", "nobody"):
        served.engine.abort(name)
    served.go.set()
    await check_unread_was_aborted(unread)
    loads, runs, waits = [ending(await task) for task in tasks]
    assert loads == (FinishReason.ABORT, None)
    assert runs == (FinishReason.LENGTH, None)
    assert waits == (FinishReason.ABORT, None)


async def test_closing_aborts_requests_at_every_stage_and_refuses_new_ones(start: Any) -> None:
    served = start(go=False, max_num_seqs=1)
    tasks, unread = await begin_at_every_stage(served)
    closing = asyncio.create_task(served.engine.close())
    await asyncio.sleep(0)  # the closing begins
    with pytest.raises(EngineStopped):
        served.engine.submit(ask("late"))
    served.go.set()
    await asyncio.wait_for(closing, 10)
    served.check_empty()
    await check_unread_was_aborted(unread)
    endings = [ending(await task) for task in tasks]
    assert endings == [(FinishReason.ABORT, None)] * 3


async def test_a_request_that_cannot_run_is_refused_at_once_and_takes_no_place(start: Any) -> None:
    served = start(go=False, max_num_seqs=1, max_queue=2, max_model_len=10)
    for num_prompt, max_tokens in ((0, 1), (8, 3), (11, 1)):
        with pytest.raises(PromptTooLong):
            served.engine.submit(ask("long", prompt=(5,) * num_prompt, max_tokens=max_tokens))
    fitting = [ask(str(number), prompt=(5,) * 8, max_tokens=2) for number in range(3)]
    tasks = served.start(*fitting)
    await happens(served.at_step)
    with pytest.raises(QueueFull) as caught:
        served.engine.submit(ask("over"))
    assert caught.value.allowed == 2
    assert caught.value.retry_after >= 1
    served.go.set()
    reasons = [ending(outputs)[0] for outputs in await asyncio.gather(*tasks)]
    assert reasons == [FinishReason.LENGTH] * 3


async def test_a_queue_that_one_owner_has_filled_takes_the_others_requests(start: Any) -> None:
    served = start(max_queue=4, go=False)

    def of(owner: str, name: str) -> Request:
        return replace(ask(name), owner=owner)

    tasks = served.start(*(of("many", f"many-{i}") for i in range(6)))
    await happens(served.at_step)
    with pytest.raises(QueueFull):
        served.engine.submit(of("many", "one more"))
    tasks += served.start(*(of("few", f"few-{i}") for i in range(3)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        served.engine.submit(of("few", "more than an equal part"))
    served.go.set()
    for outputs in await asyncio.wait_for(asyncio.gather(*tasks), 10):
        assert ending(outputs)[0] is FinishReason.LENGTH


async def test_a_deadline_aborts_a_running_or_waiting_request_and_is_its_error(start: Any) -> None:
    served = start(go=False, max_num_seqs=1)
    now = 0.0
    served.core.clock = lambda: now
    runs = ask("runs", BOTH, deadline=1.0, max_tokens=300)
    waits = ask("waits", BOTH, deadline=1.0, max_tokens=300)
    tasks = served.start(runs, waits, ask("in time", deadline=9.0))
    await happens(served.at_step)
    now = 1.0
    served.go.set()
    endings = [ending(outputs) for outputs in await asyncio.gather(*tasks)]
    late = (FinishReason.ABORT, "deadline")
    assert endings == [late, late, (FinishReason.LENGTH, None)]


async def test_a_failing_step_ends_its_own_sequences_only(start: Any) -> None:
    """It fails with both sequences, and with each of them alone."""
    served = start(go=False)
    tasks = served.start(ask("unlucky", n=2))
    await happens(served.at_step)
    tasks += served.start(ask("waits", BOTH))
    served.failures += [RuntimeError("out of memory")] * 3
    served.go.set()
    unlucky, waited = await asyncio.gather(*tasks)
    failure = (FinishReason.ERROR, "the step failed")
    assert [(output.finish_reason, output.error) for output in unlucky] == [failure] * 2
    assert ending(waited)[0] is FinishReason.LENGTH
    assert len(tokens(waited)) == 6


async def test_an_unexpected_failure_of_the_engine_ends_every_request(start: Any) -> None:
    served = start(go=False)
    tasks = served.start(ask("runs", n=2), ask("waits", BOTH))
    await happens(served.at_step)
    served.core.scheduler.schedule = None  # the next step raises a TypeError
    served.go.set()
    for outputs in await asyncio.wait_for(asyncio.gather(*tasks), 10):
        assert ending(outputs)[0] is FinishReason.ERROR
    with pytest.raises(EngineStopped):
        served.engine.submit(ask("later"))
    assert served.engine.stats().has_failed
    assert "object is not callable" in served.engine.stats().failure
    await asyncio.wait_for(served.engine.close(), 10)


async def test_a_sequence_that_has_ended_ends_no_second_time_when_the_engine_fails(
    start: Any,
) -> None:
    served = start(max_num_seqs=1)
    ends = []
    async for output in served.engine.submit(ask("r", n=2, max_tokens=300)):
        if output.finish_reason is not None:
            ends.append((output.index, output.finish_reason))
            served.core.scheduler.schedule = None
    assert ends == [(0, FinishReason.LENGTH), (1, FinishReason.ERROR)]
    await asyncio.wait_for(served.engine.close(), 10)


async def test_a_request_that_comes_while_the_engine_fails_ends_with_an_error(start: Any) -> None:
    """It was in no queue that anybody looked at any more, so it waited for ever."""
    served = start()
    check_room = served.engine._check_room

    def fail_meanwhile(request: Request) -> None:
        check_room(request)
        served.core.scheduler.schedule = None
        served.engine._wake_thread()
        served.engine._thread.join(10)

    served.engine._check_room = fail_meanwhile
    outputs = await asyncio.wait_for(served.outputs(ask("r")), 10)
    assert ending(outputs) == (FinishReason.ERROR, "the engine failed")
    await asyncio.wait_for(served.engine.close(), 10)


async def test_an_engine_that_loads_nothing_ends_without_a_warning(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Every end said that an adapter still loads, and did not wait for one that did."""
    served = start()
    await served.outputs(ask("r", BOTH))
    await asyncio.wait_for(served.engine.close(), 10)
    assert caplog.messages == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        served.engine.pool.executor.submit(print)


async def test_a_warm_up_whose_step_fails_raises(start: Any) -> None:
    served = start()
    served.failures.append(RuntimeError("out of memory"))
    with pytest.raises(EngineStopped, match="the first step failed: the step failed"):
        await served.engine.warm_up()
    await served.engine.warm_up()


async def test_requests_that_wait_for_one_failing_load_raise_errors_of_their_own(
    start: Any,
) -> None:
    served = start(go=False)
    tasks = served.start(ask("first", SLOW), ask("second", SLOW))
    await happens(served.at_load)
    served.failures.append(InvalidAdapter("not what its manifest says"))
    served.go.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in errors] == ["not what its manifest says"] * 2
    assert errors[0] is not errors[1]
    served.pool.register("slow", lambda: ADAPTERS["task-1"])
