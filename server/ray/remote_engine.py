"""The engine of the ingress: each request runs in a replica."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crma.core.errors import CrmaError, NotFound
from server.engine.errors import EngineStopped, PromptTooLong
from server.engine.inference_engine import Outputs, ServedModel
from server.engine.request import Constraint, EngineStats, FinishReason, Request, RequestOutput
from server.engine.room import check_room
from server.ray.call import Call, Part
from server.ray.fleet import Fleet
from server.ray.interruptible import Interrupted, interruptible
from server.ray.replicas import ReplicaDied, Replicas

if TYPE_CHECKING:
    from crma.method.backbone import Backbone
    from crma.method.lora import Lora
    from server.engine.inference_engine import Loader

log = logging.getLogger("server")

MAX_RUNS = 2  # of a request: it runs again, once, if its replica ends
POLL_SECONDS = 1.0
LATE_SECONDS = 2.0  # after its deadline, a request whose replica does not say so is ended
STEP_SECONDS = 0.1  # of which Retry-After is estimated


@dataclass
class RunCounters:
    """What has become of requests whose replica ended: run again, or lost."""

    num_retried: int = 0
    num_lost: int = 0


@dataclass(eq=False)
class _Open:
    """A request that has not ended.

    Attributes:
        ended: set to what ends it early.
        unfinished: its sequences that have not ended.
        has_begun: an output has been seen.
    """

    request: Request
    ended: asyncio.Future[str | None]
    unfinished: set[int]
    has_begun: bool = False


class RemoteEngine:
    """The `InferenceEngine` whose requests run in replicas.

    Loading, pinning and unloading an adapter are acts on every replica. An adapter is loaded from
    here: `adapter` gives it to the replicas.

    Args:
        replicas: the way to them.
        model: what they serve.
        max_running: sequences that run in one of them at once.
        max_queue: sequences that may wait in one of them.

    Attributes:
        fleet: their states.
        counters: of requests whose replica ended.
    """

    def __init__(
        self, replicas: Replicas, model: ServedModel, *, max_running: int, max_queue: int
    ) -> None:
        self.model = model
        self.on_failure: Callable[[], None] = lambda: None
        self.fleet = Fleet()
        self.counters = RunCounters()
        self._replicas = replicas
        self._max_running = max_running
        self._max_queue = max_queue
        self._loaders: dict[str, Loader] = {}
        self._sizes: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._open: dict[str, _Open] = {}
        self._acts: set[asyncio.Task[None]] = set()  # that nobody waits for
        self._watching: asyncio.Task[None] | None = None
        self._stopped = False

    # Requests ----------------------------------------------------------------------------------

    async def check(self, constraint: Constraint) -> None:
        """Check a constraint in a replica. See `InferenceEngine.check`."""
        self._check_started()
        try:
            error = await self._replicas.check(constraint)
        except ReplicaDied:
            error = await self._replicas.check(constraint)
        if error is not None:
            raise error

    def submit(self, request: Request) -> Outputs:
        """Queue a request; it leaves when its first output is asked for. See `InferenceEngine`."""
        self._check_started()
        self._check_length(request)
        self._check_room(request)
        ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        opened = _Open(request, ended, set(range(request.sampling.n)))
        self._open[request.id] = opened
        return self._outputs(opened)

    def abort(self, request_id: str) -> None:
        """End a request; its sequences finish with reason abort. Unknown ids are ignored."""
        opened = self._open.pop(request_id, None)
        if opened is not None and not opened.ended.done():
            opened.ended.set_result(None)

    def stats(self) -> EngineStats:
        """The states of all replicas, as one engine's."""
        return self.fleet.stats()

    async def warm_up(self) -> None:
        """Wait until a replica serves, and let those that do run their first step."""
        self._check_started()
        while not self.fleet.running:
            await self._every("warm_up")
            if not self.fleet.running:
                await asyncio.sleep(POLL_SECONDS)
        if self._watching is None:
            self._watching = asyncio.create_task(self._look_forever())

    async def close(self) -> None:
        """Take no new requests and end those that run here. The replicas are not this one's."""
        self._stopped = True
        for request_id in list(self._open):
            self.abort(request_id)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._acted()

    # Adapters ----------------------------------------------------------------------------------

    def register(self, digest: str, loader: Loader, num_parameters: int) -> None:
        """Make an adapter loadable in the replicas."""
        self._loaders[digest] = loader
        self._sizes[digest] = num_parameters

    def adapter(self, digest: str) -> Lora | Backbone:
        """What the loader of an adapter gives. Called off the event loop.

        Raises:
            NotFound: it is not registered.
            StoreError: raised by the loader.
        """
        loader = self._loaders.get(digest)
        if loader is None:
            raise NotFound("this adapter is not registered", field="digest", value=digest)
        return loader()

    async def load(self, digest: str) -> None:
        """Make an adapter resident in every replica. See `InferenceEngine.load`."""
        await self._every("load", digest, self._sizes_of(digest))

    async def unload(self, digest: str, *, wait_s: float = 0.0, cancel: bool = False) -> None:
        """Free an adapter in every replica. See `InferenceEngine.unload`."""
        await self._acted()
        await self._every("unload", digest, wait_s, cancel)

    async def pin(self, digest: str) -> None:
        """Load an adapter in every replica, and in every later one, and keep it there."""
        await self._acted()
        try:
            await self._every("pin", digest, self._sizes_of(digest))
        except CrmaError:
            self.unpin(digest)
            raise
        self._pinned.add(digest)

    def unpin(self, digest: str) -> None:
        """Let a pinned adapter be evicted again."""
        self._pinned.discard(digest)
        self._act("unpin", digest)

    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters in the memory of some replica, sorted."""
        return self.fleet.stats().resident

    # What a request goes through ---------------------------------------------------------------

    def _check_started(self) -> None:
        if self._stopped:
            raise EngineStopped("the server is stopping and takes no new requests")

    def _check_length(self, request: Request) -> None:
        length, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        if not 0 < length <= self.model.max_model_len - max_tokens:
            raise PromptTooLong(length, max_tokens, self.model.max_model_len)

    def _check_room(self, request: Request) -> None:
        """Raises QueueFull if no more sequences may run and wait, in all replicas together."""
        num_open: Counter[str] = Counter()
        for opened in self._open.values():
            num_open[opened.request.owner] += len(opened.unfinished)
        num_replicas = max(1, len(self.fleet.running))
        check_room(
            num_open,
            request.owner,
            request.sampling.n,
            max_running=num_replicas * self._max_running,
            max_queue=num_replicas * self._max_queue,
            step_s=STEP_SECONDS,
        )

    async def _outputs(self, opened: _Open) -> Outputs:
        """The outputs of a request, which runs again if its replica ends before the first."""
        try:
            for run in range(MAX_RUNS):
                self.counters.num_retried += run > 0
                try:
                    async with aclosing(self._parts(opened)) as outputs:
                        async for output in outputs:
                            opened.has_begun = True
                            yield output
                    return
                except ReplicaDied:
                    if opened.has_begun:
                        break
            self.counters.num_lost += 1
            log.warning("request %s is lost: its replica has ended", opened.request.id)
            for output in _aborted(opened, "lost"):
                yield output
        finally:
            self._open.pop(opened.request.id, None)

    async def _parts(self, opened: _Open) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one run of a request. Raises ReplicaDied, and what the engine raised."""
        request = opened.request
        sizes: dict[str, int] = {}
        for digest in request.selection:
            if digest is not None:
                sizes |= self._sizes_of(digest)
        call = Call.of(request, sizes)
        until = None if request.deadline is None else request.deadline + LATE_SECONDS
        parts = interruptible(self._replicas.generate(call), opened.ended, until)
        try:
            async with aclosing(parts):
                async for part in parts:
                    for output in self._of_part(part, opened):
                        yield output
        except Interrupted as interrupted:
            for output in _aborted(opened, interrupted.reason):
                yield output

    def _of_part(self, part: Part, opened: _Open) -> tuple[RequestOutput, ...]:
        """The outputs of a part. Raises what the engine raised."""
        if part.status is not None:
            self.fleet.see(part.status)
        if part.error is not None:
            raise part.error
        for output in part.outputs:
            if output.finish_reason is not None:
                opened.unfinished.discard(output.index)
        return part.outputs

    def _sizes_of(self, digest: str) -> dict[str, int]:
        size = self._sizes.get(digest)
        return {} if size is None else {digest: size}

    # All replicas ------------------------------------------------------------------------------

    async def _every(self, act: str, *arguments: Any) -> None:
        """Act in every replica. Raises the first error."""
        answers = await self._replicas.every(act, *arguments)
        for status, _ in answers:
            self.fleet.see(status)
        for _, error in answers:
            if error is not None:
                raise error

    def _act(self, act: str, *arguments: Any) -> None:
        """Act in every replica without waiting for it; `_acted` does."""
        task = asyncio.create_task(self._every(act, *arguments))
        self._acts.add(task)
        task.add_done_callback(self._acts.discard)

    async def _acted(self) -> None:
        for result in await asyncio.gather(*self._acts, return_exceptions=True):
            if isinstance(result, Exception):
                log.warning("not every replica has done its act: %s", result)

    async def _look_forever(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> None:
        """See how all replicas are. New ones pin what the others have pinned."""
        try:
            answers = await self._replicas.every("status")
        except Exception as error:  # nothing must end the watch
            log.warning("a replica does not say how it is: %s", error)
            return
        new = self.fleet.see_all(status for status, _ in answers)
        if new:
            log.info("replicas that serve now: %s", ", ".join(sorted(new)))
            for digest in self._pinned:
                self._act("pin", digest, self._sizes_of(digest))


def _aborted(opened: _Open, error: str | None) -> list[RequestOutput]:
    """The last outputs of the sequences that have not ended."""
    return [
        RequestOutput(opened.request.id, index, finish_reason=FinishReason.ABORT, error=error)
        for index in sorted(opened.unfinished)
    ]
