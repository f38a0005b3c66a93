"""The native engine behind the seam: asyncio on one side, the engine's own thread on the other."""

import asyncio
import copy
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from server.engine.errors import EngineStopped
from server.engine.inference_engine import Outputs, ServedModel
from server.engine.native.engine import Engine
from server.engine.native.pooled_engine import PooledEngine
from server.engine.native.sequence import Sequence
from server.engine.native.step_watchdog import StepWatchdog
from server.engine.request import (
    Constraint,
    EngineStats,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)
from server.engine.room import check_length, check_room

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # the longest wait for a load at the end: its file system may never answer

Command = Callable[[], list[RequestOutput] | None]


@dataclass(eq=False)
class _Stream:
    """Where the outputs of one request go, and which of its sequences have not finished."""

    request: Request
    queue: asyncio.Queue[RequestOutput]
    open: set[int]


class AsyncEngine(PooledEngine):
    """The `InferenceEngine` that runs an `Engine` in a thread; the thread starts at once.

    The event loop sends commands (add, abort) to the thread, which carries them out between two
    steps and sends the outputs of each step back in one piece.

    Args:
        model: what `engine` runs.
        max_queue: sequences that may wait beside those that run; a request that exceeds it is
            refused, unless its owner has less than an equal part.
        watchdog: ends the process when a step hangs; left out: nothing does. The first step is not
            watched: it may compile or build what later ones use.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        max_queue: int,
        watchdog: StepWatchdog | None = None,
    ) -> None:
        super().__init__(model, engine.pool)
        self.engine = engine
        self.max_queue = max_queue
        self.watchdog = watchdog or StepWatchdog(0)
        self._wake = threading.Condition()
        self._commands: list[Command] = []
        self._streams: dict[str, _Stream] = {}
        self._stopped = False
        self._ended = False  # the thread has carried out its last command
        self._step_seconds = 0.1
        self._stats = EngineStats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.pool.on_change = self._wake_thread  # a request that waits for an adapter may start
        self._thread.start()

    # Requests ----------------------------------------------------------------------------------

    async def check(self, constraint: Constraint) -> None:
        """Compile a constraint in another thread. See `InferenceEngine.check`."""
        self._check_open()
        await self.engine.constraints.check(constraint)

    def submit(self, request: Request) -> Outputs:
        """Queue a request; its outputs follow. See `InferenceEngine.submit`."""
        self._loop = asyncio.get_running_loop()
        self._check_open()
        check_length(request.prompt_ids, request.sampling.max_tokens, self.engine.max_model_len)
        self._check_room(request)
        stream = _Stream(request, asyncio.Queue(), set(range(request.sampling.n)))
        self._streams[request.id] = stream
        self._send(lambda: self.engine.add(request))
        return self._outputs(stream)

    def abort(self, request_id: str) -> None:
        """End a request in the next step; its stream ends with finish_reason abort."""
        self._send(lambda: self.engine.abort(request_id))

    def stats(self) -> EngineStats:
        """The state after the last step."""
        return self._stats

    async def warm_up(self) -> None:
        """Run one token of the base model. See `InferenceEngine.warm_up`."""
        prompt_ids = tuple(self.engine.tokenizer.encode("Hello"))
        request = Request("warm-up", prompt_ids, sampling=SamplingParams(max_tokens=1))
        async with aclosing(self.submit(request)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise EngineStopped(f"the first step failed: {output.error}")

    async def close(self) -> None:
        """Take nothing new, abort what has not finished, and end all threads but one that hangs."""
        for request_id in list(self._streams):
            self.abort(request_id)
        with self._wake:
            self._stopped = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        closing = asyncio.ensure_future(self._threads.run(self.pool.close))
        await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        if closing.done():
            await self._threads.wait(CLOSE_SECONDS)
        else:
            closing.cancel()
            logger.warning("an adapter still loads, and is left behind: its files do not answer")
        self.engine.constraints.close()

    # On the event loop -------------------------------------------------------------------------

    def _check_open(self) -> None:
        """Raises EngineStopped if the engine takes no new requests."""
        if self._stopped:
            reason = "the engine has failed" if self._stats.has_failed else "the server is stopping"
            raise EngineStopped(f"{reason} and takes no new requests")

    def _check_room(self, request: Request) -> None:
        """Raises QueueFull if no more sequences may run and wait."""
        num_open: Counter[str] = Counter()
        for stream in self._streams.values():
            num_open[stream.request.owner] += len(stream.open)
        check_room(
            num_open,
            request.owner,
            request.sampling.n,
            max_running=self.engine.scheduler.max_num_seqs,
            max_queue=self.max_queue,
            step_s=self._step_seconds,
        )

    async def _outputs(self, stream: _Stream) -> Outputs:
        num_open = stream.request.sampling.n
        try:
            while num_open:
                output = await stream.queue.get()
                if output.cause is not None:
                    # A copy: one instance raised in many streams would gather their tracebacks.
                    raise copy.copy(output.cause)
                if output.finish_reason is not None:
                    num_open -= 1
                yield output
        finally:
            unfinished = self._streams.pop(stream.request.id, None)
            if unfinished is not None:
                self.abort(stream.request.id)

    def _put(self, outputs: list[RequestOutput]) -> None:
        """Give each output to its stream.

        A request that has ended leaves the queue's count, read or not.
        """
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                stream.open.discard(output.index)
            if not stream.open:
                del self._streams[output.request_id]
            stream.queue.put_nowait(output)

    def _abort_adapter(self, digest: str) -> None:
        self._send(lambda: self.engine.abort_adapter(digest))

    def _end_streams(self) -> None:
        """Every open request ends with an error: the engine has failed.

        On the event loop, where no request is half submitted and nothing ends meanwhile.
        """
        failed = partial(RequestOutput, finish_reason=FinishReason.ERROR, error="the engine failed")
        for request_id, stream in list(self._streams.items()):
            self._put([failed(request_id, index) for index in sorted(stream.open)])

    # To and from the engine's thread -----------------------------------------------------------

    def _send(self, command: Command) -> None:
        """Have the thread carry out a command before its next step; if it has ended, carry it out
        here.
        """
        with self._wake:
            if not self._ended:
                self._commands.append(command)
                self._wake.notify()
                return
        self._deliver(command() or [])  # no step can be running any more

    def _wake_thread(self) -> None:
        self._send(lambda: None)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Send outputs to the event loop, all at once: every call wakes the loop."""
        if outputs:
            self._call(partial(self._put, outputs))

    # In the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        """Serve until closed.

        If the engine fails, every open request ends with an error and no new one is taken.
        """
        try:
            self._serve()
        except Exception as error:
            logger.exception("the engine has failed and takes no more requests")
            with self._wake:
                self._stopped = True
                self._ended = True
                self._commands.clear()
            self._stats = replace(self._stats, has_failed=True, failure=str(error))
            self._call(self._end_streams)
            self.on_failure()
        finally:
            self.watchdog.disarm()

    def _serve(self) -> None:
        """Carry out commands, run a step, deliver its outputs; sleep while there is nothing to
        run.
        """
        is_idle = True
        while True:
            commands = self._next_commands(is_idle)
            if commands is None:
                return
            outputs = []
            for command in commands:
                outputs += command() or []
            started = time.monotonic()
            outputs += self._step()
            is_idle = self.engine.is_idle
            if not is_idle:
                self._count_step(time.monotonic() - started)
            elif not self.engine.scheduler.unfinished():
                self.engine.check_integrity()
            self._stats = self._snapshot()
            self._deliver(outputs)

    def _step(self) -> list[RequestOutput]:
        """Run a step, watched by the watchdog unless it is the first."""
        if self.engine.counters.num_steps:
            self.engine.on_pass = self.watchdog.arm  # each pass of a step has the full time
            self.watchdog.arm()
        return self.engine.step()

    def _next_commands(self, is_idle: bool) -> list[Command] | None:
        """The commands that have come; an idle engine waits for one, or for a deadline.

        None: closed, nothing left.
        """
        if is_idle:
            self.watchdog.disarm()
        with self._wake:
            while is_idle and not self._commands and not self._stopped:
                was_notified = self._wake.wait(self.engine.seconds_left())
                if not was_notified:
                    break  # a deadline has passed
            if self._stopped and not self._commands:
                self._ended = True
                return None
            commands = self._commands
            self._commands = []
            return commands

    def _count_step(self, seconds: float) -> None:
        """Keep a moving average of the time that a step takes."""
        self._step_seconds = 0.9 * self._step_seconds + 0.1 * seconds

    def _snapshot(self) -> EngineStats:
        scheduler = self.engine.scheduler
        blocks = scheduler.blocks
        return EngineStats(
            **vars(self.engine.counters),
            **vars(self.pool.counters),
            num_requests_running=_num_requests(scheduler.running),
            num_requests_waiting=scheduler.waiting.num_requests(),
            kv_cache_usage=1 - blocks.num_free / blocks.capacity,
            adapter_uses=self.pool.num_users(),
            resident=self.pool.resident(),
            running_adapters=_task_digests(scheduler.running),
            waiting_adapters=tuple(sorted(scheduler.waiting.tasks())),
            num_blocks=blocks.capacity,
            block_size=blocks.block_size,
        )


def _num_requests(sequences: Iterable[Sequence]) -> int:
    return len({sequence.request.id for sequence in sequences})


def _task_digests(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """Digests of the task adapters that sequences select, sorted."""
    digests = {sequence.request.selection.task_digest for sequence in sequences}
    return tuple(sorted(digest for digest in digests if digest is not None))
