"""What engines share whose adapters are in an `AdapterPool`."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from server.daemon_threads import DaemonThreads
from server.engine.inference_engine import ServedModel
from server.engine.native.adapter_pool import AdapterPool, Loader


class PooledEngine(ABC):
    """The part of an `InferenceEngine` that is about adapters.

    Args:
        model: what is served.
        pool: the engine's own.
    """

    def __init__(self, model: ServedModel, pool: AdapterPool) -> None:
        self.model = model
        self.pool = pool
        self.on_failure: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop that submits
        self._threads = DaemonThreads()  # that wait for loads

    def register(self, digest: str, loader: Loader, num_parameters: int) -> None:
        """Make an adapter loadable; its size in memory is estimated from `num_parameters`."""
        itemsize = self.pool.injection.model.dtype.itemsize
        self.pool.register(digest, loader, num_parameters * itemsize)

    async def load(self, digest: str) -> None:
        """Make an adapter resident. See `InferenceEngine.load`."""
        await self._threads.run(partial(self.pool.load, digest))

    async def unload(self, digest: str, *, wait_s: float = 0.0, cancel: bool = False) -> None:
        """Free a resident adapter. See `InferenceEngine.unload`."""
        abort = partial(self._abort_adapter, digest) if cancel else None
        await asyncio.to_thread(self.pool.unload, digest, wait_s=wait_s, abort=abort)

    async def pin(self, digest: str) -> None:
        """Load an adapter and keep it resident until `unpin`."""
        await self._threads.run(partial(self.pool.pin, digest))

    def unpin(self, digest: str) -> None:
        """Let a pinned adapter be evicted again."""
        self.pool.unpin(digest)

    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters in memory, least recently used first."""
        return self.pool.resident()

    @abstractmethod
    def _abort_adapter(self, digest: str) -> None:
        """Abort the requests that run with an adapter. Called in any thread."""

    def _call(self, function: Callable[[], None]) -> None:
        """Have the event loop call a function, after all that it was sent before."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function)
