"""The seam: asyncio on one side, the engine's thread on the other. `submit`, `abort`, `stats`; nothing else crosses."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from crma.selection import AdapterSelection
from server.engine.adapter_pool import AdapterPool
from server.engine.engine import Engine
from server.engine.request import (
    EngineStats,
    EngineStopped,
    FinishReason,
    PromptTooLong,
    QueueFull,
    Request,
    RequestOutput,
    Timings,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Stream:
    """Where one request's outputs go, and which of its sequences are still open."""

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[list[RequestOutput]]
    open: set[int]
    aborted: bool = False


class AsyncEngine:
    """Runs an `Engine` in a thread and gives every request its stream of outputs.

    Args:
        max_queue: requests that may wait for a slot; one more is refused.
    """

    def __init__(self, engine: Engine, pool: AdapterPool, max_queue: int) -> None:
        self.engine = engine
        self.pool = pool
        self.max_queue = max_queue
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], list[RequestOutput]]] = deque()
        self._streams: dict[str, _Stream] = {}
        self._draining = False
        self._stopped = False
        self._ended = False  # the thread has carried out its last command
        self._step_seconds = 0.1
        self._stats = EngineStats()
        self.on_failure: Callable[[], None] = lambda: None  # called once, in the engine's thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Take a request; its outputs follow. Closing the iterator once it is being read aborts the request.

        Raises:
            EngineStopped, QueueFull, PromptTooLong: at once, nothing taken.
            crma.errors.StoreError: from the first output, where an adapter cannot be loaded.
        """
        if self._draining or self._stopped:
            why = "the engine has failed" if self._stats.has_failed else "the server is shutting down"
            raise EngineStopped(f"{why} and takes no new requests")
        room = self.engine.max_model_len - request.sampling.max_tokens
        if not 0 < len(request.prompt_ids) <= room:
            raise PromptTooLong(len(request.prompt_ids), request.sampling.max_tokens, self.engine.max_model_len)
        waiting = len(self._streams) - self.engine.scheduler.max_num_seqs
        if waiting >= self.max_queue:
            raise QueueFull(self.max_queue, max(1.0, waiting * self._step_seconds))
        stream = _Stream(request, asyncio.get_running_loop(), asyncio.Queue(), set(range(request.sampling.n)))
        self._streams[request.id] = stream
        return self._outputs(stream)

    def abort(self, request_id: str) -> None:
        """End a request in the next step; its stream ends with finish_reason abort. Unknown ids are ignored."""
        if stream := self._streams.get(request_id):
            stream.aborted = True
        self._command(lambda: self.engine.abort(request_id))

    def stats(self) -> EngineStats:
        """The state after the last step."""
        return self._stats

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, let what runs finish for `grace_s` seconds, then end the rest and the thread."""
        self._draining = True
        deadline = time.monotonic() + grace_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for request_id in list(self._streams):
            self.abort(request_id)
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    async def _outputs(self, stream: _Stream) -> AsyncIterator[RequestOutput]:
        request = stream.request
        # A future of its own: if the client goes while an adapter loads, the load ends, and its pin is given back.
        pin = asyncio.ensure_future(self._pin(request.selection))
        try:
            await asyncio.shield(pin)
            self._command(lambda: self._add(stream))
            while stream.open:
                for output in await stream.queue.get():
                    if output.index not in stream.open:
                        continue
                    if output.finish_reason is not None:
                        stream.open.remove(output.index)
                    yield output
        finally:
            self._streams.pop(request.id, None)
            pin.add_done_callback(lambda done: self._release(stream, done))

    async def _pin(self, selection: AdapterSelection) -> None:
        if not self.pool.pin_if_resident(selection):  # a slow load holds up only those who need it
            await asyncio.to_thread(self.pool.pin_selection, selection)

    def _release(self, stream: _Stream, pin: asyncio.Future[None]) -> None:
        """Give the pins back, but never under a running step: the engine's thread does it once it is done."""
        if pin.cancelled() or pin.exception() is not None:
            return
        self._command(lambda: self._abort_and_unpin(stream.request))

    def _add(self, stream: _Stream) -> list[RequestOutput]:
        if stream.aborted:
            return _endings(stream.request, FinishReason.ABORT)
        self.engine.add(stream.request)
        return []

    def _abort_and_unpin(self, request: Request) -> list[RequestOutput]:
        self.engine.abort(request.id)
        self.pool.unpin_selection(request.selection)
        return []

    def _command(self, command: Callable[[], list[RequestOutput]]) -> None:
        with self._wake:
            if not self._ended:
                self._commands.append(command)
                self._wake.notify()
                return
        self._deliver(command())  # no step can be running any more

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
            self._deliver([o for r in requests for o in _endings(r, FinishReason.ERROR, "the engine failed")])
            self.on_failure()

    def _serve(self) -> None:
        """Commands, then a step, until stopped; sleeps when there is nothing to do."""
        while True:
            with self._wake:
                while not (self._commands or self.engine.scheduler.has_work() or self._stopped):
                    self._wake.wait()
                if self._stopped and not self._commands:
                    self._ended = True
                    return
                commands = list(self._commands)
                self._commands.clear()
            outputs = [output for command in commands for output in command()]
            started = time.monotonic()
            outputs += self.engine.step()
            self._step_seconds = 0.9 * self._step_seconds + 0.1 * (time.monotonic() - started)
            self._stats = self._snapshot()
            self._deliver(outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        by_request: dict[str, list[RequestOutput]] = {}
        for output in outputs:
            by_request.setdefault(output.request_id, []).append(output)
        for request_id, mine in by_request.items():
            if (stream := self._streams.get(request_id)) and not stream.loop.is_closed():
                stream.loop.call_soon_threadsafe(stream.queue.put_nowait, mine)

    def _snapshot(self) -> EngineStats:
        scheduler, counters, pool = self.engine.scheduler, self.engine.counters, self.pool.stats()
        running = [s.request for s in scheduler.running]
        waiting = [s.request for s in scheduler.waiting]
        return EngineStats(
            num_requests_running=len({request.id for request in running}),
            num_requests_waiting=len({request.id for request in waiting}),
            num_steps=counters.num_steps,
            kv_cache_usage=len(running) / scheduler.max_num_seqs,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            adapter_loads=pool.loads,
            adapter_load_seconds=pool.load_seconds,
            adapter_evictions=pool.evictions,
            resident=self.pool.resident(),
            running_adapters=tuple(sorted({d for request in running if (d := request.selection.task_digest)})),
            waiting_adapters=tuple(sorted({d for request in waiting if (d := request.selection.task_digest)})),
        )


def _endings(request: Request, reason: FinishReason, error: str | None = None) -> list[RequestOutput]:
    """The last output of each sequence of a request that the engine does not hold."""
    waited = time.monotonic() - request.arrival
    timings = Timings(waited, None, waited)
    indices = range(request.sampling.n)
    return [RequestOutput(request.id, i, finish_reason=reason, error=error, timings=timings) for i in indices]
