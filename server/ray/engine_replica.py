"""A replica: an engine in a process of its own, which takes the calls of the ingress."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from crma.core.errors import CrmaError
from server.engine.inference_engine import InferenceEngine, ServedModel
from server.engine.request import Constraint
from server.ray.call import Call, Part, Status, joined

if TYPE_CHECKING:
    from crma.method.backbone import Backbone
    from crma.method.lora import Lora

    Fetch = Callable[[str], Lora | Backbone]

log = logging.getLogger("server")

Answer = tuple[Status, CrmaError | None]
"""The state of a replica after an act, and what its engine raised."""


class EngineReplica:
    """One replica of the engine.

    It needs no store: the ingress verifies adapters, and gives them to replicas that load them.
    Errors of the engine are returned, not raised: they cross between processes as they are.

    Args:
        name: unique in the life of the application.
        engine: runs.
        fetch: called with a digest off the event loop, gives the adapter or raises StoreError.
    """

    def __init__(self, name: str, engine: InferenceEngine, fetch: Fetch) -> None:
        self.name = name
        self.engine = engine
        self._fetch = fetch
        self._registered: set[str] = set()

    def model(self) -> ServedModel:
        """What it serves."""
        return self.engine.model

    def current(self) -> Status:
        """Its state after the last step."""
        stats = self.engine.stats()
        stats.resident = self.engine.resident()
        return Status(self.name, stats)

    async def generate(self, call: Call) -> AsyncGenerator[Part, None]:
        """Run a request: its outputs as they come, or all at its end if it is not streamed."""
        request = call.received()
        self._register(call.sizes)
        kept = []
        try:
            if request.sampling.constraint is not None:
                await self.engine.check(request.sampling.constraint)  # made ready in another one
            async with aclosing(self.engine.submit(request)) as outputs:
                async for output in outputs:
                    if request.is_streamed:
                        yield Part((output,))
                    else:
                        kept.append(output)
        except CrmaError as error:
            yield Part(error=error, status=self.current())
            return
        yield Part(joined(kept), status=self.current())

    async def check(self, constraint: Constraint) -> CrmaError | None:
        """Check a constraint."""
        try:
            await self.engine.check(constraint)
        except CrmaError as error:
            return error
        return None

    async def status(self) -> Answer:
        """Nothing but its state."""
        return self.current(), None

    async def warm_up(self) -> Answer:
        """Run the first step, if none has run."""
        if self.engine.stats().num_steps:
            return self.current(), None
        return await self._after(self.engine.warm_up)

    async def load(self, digest: str, sizes: Mapping[str, int]) -> Answer:
        """Make an adapter resident. `sizes`: as in Call."""
        self._register(sizes)
        return await self._after(partial(self.engine.load, digest))

    async def pin(self, digest: str, sizes: Mapping[str, int]) -> Answer:
        """Load an adapter and keep it resident. `sizes`: as in Call."""
        self._register(sizes)
        return await self._after(partial(self.engine.pin, digest))

    async def unpin(self, digest: str) -> Answer:
        """Let a pinned adapter be evicted again."""
        self.engine.unpin(digest)
        return self.current(), None

    async def unload(self, digest: str, wait_s: float, cancel: bool) -> Answer:
        """Free a resident adapter."""
        return await self._after(partial(self.engine.unload, digest, wait_s=wait_s, cancel=cancel))

    async def _after(self, act: Callable[[], Awaitable[None]]) -> Answer:
        try:
            await act()
        except CrmaError as error:
            return self.current(), error
        return self.current(), None

    def _register(self, sizes: Mapping[str, int]) -> None:
        """Let the engine load adapters that the ingress has."""
        for digest, num_parameters in sizes.items():
            if digest not in self._registered:
                self._registered.add(digest)
                self.engine.register(digest, partial(self._fetch, digest), num_parameters)
