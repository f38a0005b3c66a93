"""The seam: asyncio on one side, the engine's thread on the other. `submit`, `abort`, `stats`, and an administrator's
`cancel_adapter`; nothing else crosses."""

import asyncio
import copy
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from server.engine.errors import EngineStopped, PromptTooLong, QueueFull
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.engine import Engine
from server.engine.request import EngineStats, FinishReason, Request, RequestOutput

logger = logging.getLogger(__name__)

Command = Callable[[], list[RequestOutput] | None]


@dataclass(eq=False)
class _Stream:
    """Where one request's outputs go, and which of its sequences are still open."""

    request: Request
    queue: asyncio.Queue[RequestOutput]
    open: set[int]


class AsyncEngine:
    """Runs an `Engine` in a thread, which starts at once, and gives every request its stream of outputs.

    Args:
        max_queue: sequences that may wait beside those that can run at once; with one more a request is refused.
    """

    def __init__(self, engine: Engine, pool: AdapterPool, max_queue: int) -> None:
        self.engine = engine
        self.pool = pool
        self.max_queue = max_queue
        self._wake = threading.Condition()
        self._commands: list[Command] = []
        self._streams: dict[str, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # of whoever submits
        self._stopped = False
        self._ended = False  # the thread has carried out its last command
        self._step_seconds = 0.1
        self._stats = EngineStats()
        self.on_failure: Callable[[], None] = lambda: None  # called once, in the engine's thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        pool.on_change = lambda: self._command(
            lambda: None
        )  # wakes the thread: who waits for an adapter may start
        self._thread.start()

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Take a request; its outputs follow. Closing the iterator once it is being read aborts the request.

        Raises:
            EngineStopped, QueueFull, PromptTooLong: at once, nothing taken.
            crma.errors.StoreError, EngineError: instead of an output, where an adapter cannot be loaded.
        """
        if self._stopped:
            why = (
                "the engine has failed" if self._stats.has_failed else "the server is shutting down"
            )
            raise EngineStopped(f"{why} and takes no new requests")
        length, most, limit = (
            len(request.prompt_ids),
            request.sampling.max_tokens,
            self.engine.max_model_len,
        )
        if not 0 < length <= limit - most:
            message = f"prompt of {length} tokens + max_tokens {most} exceeds max_model_len {limit}"
            allowed = f"prompt tokens + max_tokens <= {limit}"
            raise PromptTooLong(message, field="prompt", value=length, allowed=allowed)
        waiting = (
            sum(len(stream.open) for stream in self._streams.values())
            - self.engine.scheduler.max_num_seqs
        )
        if waiting + request.sampling.n > self.max_queue:
            raise QueueFull(self.max_queue, max(1.0, waiting * self._step_seconds))
        self._loop = asyncio.get_running_loop()
        stream = _Stream(request, asyncio.Queue(), set(range(request.sampling.n)))
        self._streams[request.id] = stream
        self._command(lambda: self.engine.add(request))
        return self._outputs(stream)

    def abort(self, request_id: str) -> None:
        """End a request in the next step; its stream ends with finish_reason abort. Unknown ids are ignored."""
        self._command(lambda: self.engine.abort(request_id))

    def cancel_adapter(self, digest: str) -> None:
        """End every sequence that runs with an adapter, in the next step."""
        self._command(lambda: self.engine.abort_adapter(digest))

    def stats(self) -> EngineStats:
        """The state after the last step."""
        return self._stats

    async def stop(self) -> None:
        """Take nothing new, end what is not finished, and the thread. Whoever calls it has let requests finish."""
        for request_id in list(self._streams):
            self.abort(request_id)
        with self._wake:
            self._stopped = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.pool.close)

    async def _outputs(self, stream: _Stream) -> AsyncIterator[RequestOutput]:
        left = stream.request.sampling.n
        try:
            while left:
                output = await stream.queue.get()
                if output.cause is not None:
                    raise copy.copy(
                        output.cause
                    )  # not one instance in many streams: it would gather tracebacks
                left -= output.finish_reason is not None
                yield output
        finally:
            if self._streams.pop(stream.request.id, None) is not None:
                self.abort(stream.request.id)

    def _command(self, command: Command) -> None:
        with self._wake:
            if not self._ended:
                self._commands.append(command)
                self._wake.notify()
                return
        self._deliver(command() or [])  # no step can be running any more

    def _run(self) -> None:
        """The engine's thread. If it fails, everybody who waits for it gets an error, and nobody new is taken."""
        try:
            self._serve()
        except Exception:
            logger.exception("the engine has failed and takes no more requests")
            with self._wake:
                self._stopped = self._ended = True
                self._commands.clear()
            self._stats = replace(self._stats, has_failed=True)
            requests = [stream.request for stream in list(self._streams.values())]
            end = partial(
                RequestOutput, finish_reason=FinishReason.ERROR, error="the engine failed"
            )
            self._deliver(
                [
                    end(request.id, index)
                    for request in requests
                    for index in range(request.sampling.n)
                ]
            )
            self.on_failure()

    def _serve(self) -> None:
        """Commands, then a step, until stopped; sleeps while a step has nothing to run."""
        is_idle = True
        while True:
            with self._wake:
                while is_idle and not (self._commands or self._stopped):
                    if not self._wake.wait(self.engine.seconds_left()):
                        break  # a deadline has passed
                if self._stopped and not self._commands:
                    self._ended = True
                    return
                commands, self._commands = self._commands, []
            outputs = [output for command in commands for output in command() or ()]
            started, num_steps = time.monotonic(), self.engine.counters.num_steps
            outputs += self.engine.step()
            is_idle = self.engine.counters.num_steps == num_steps
            if not is_idle:
                self._step_seconds = 0.9 * self._step_seconds + 0.1 * (time.monotonic() - started)
            elif not self.engine.scheduler.unfinished():
                self.engine.check_integrity()
            self._stats = self._snapshot()
            self._deliver(outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        loop = self._loop
        if outputs and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._put, outputs)  # all at once: each call wakes the loop

    def _put(self, outputs: list[RequestOutput]) -> None:
        """On the event loop. A request that has ended keeps no place, whether or not its iterator is ever read."""
        for output in outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                if output.finish_reason is not None:
                    stream.open.discard(output.index)
                if not stream.open:
                    del self._streams[output.request_id]
                stream.queue.put_nowait(output)

    def _snapshot(self) -> EngineStats:
        scheduler = self.engine.scheduler
        running = [s.request for s in scheduler.running]
        waiting = [s.request for s in scheduler.waiting]
        return EngineStats(
            **asdict(self.engine.counters),
            **asdict(self.pool.counters),
            num_requests_running=len({request.id for request in running}),
            num_requests_waiting=len({request.id for request in waiting}),
            kv_cache_usage=1 - scheduler.blocks.num_free / scheduler.blocks.capacity,
            resident=self.pool.resident(),
            running_adapters=tuple(
                sorted({d for request in running if (d := request.selection.task_digest)})
            ),
            waiting_adapters=tuple(
                sorted({d for request in waiting if (d := request.selection.task_digest)})
            ),
        )
