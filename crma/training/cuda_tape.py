"""Records what a GPU does as CUDA graphs, and plays it again.

Its rules, and where they are from, are in docs/decisions/0082.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")

Play = Callable[[], None]
"""Does again what was recorded: it reads and writes the same places in memory."""


class Tape(Protocol):
    """Records work."""

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """Do work where it is recorded later, so that libraries load and choose what it needs."""

    def record(self, work: Callable[[], None]) -> Play:
        """Record work, which is not done.

        Raises:
            RuntimeError: it cannot be recorded. Whatever comes after must be done as it comes.
        """

    def forget(self) -> None:
        """Nothing that was recorded so far is played again."""


class CudaTape:
    """Records on a stream of its own. All that it recorded shares memory, and is played in turn."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.forget()

    def forget(self) -> None:
        """As in `Tape`."""
        # torch refuses a pool of which all graphs are gone.
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """As in `Tape`."""
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            done = work()
        outside.wait_stream(self.stream)
        return done

    def record(self, work: Callable[[], None]) -> Play:
        """As in `Tape`."""
        graph = torch.cuda.CUDAGraph()
        with self._mended(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """Leave torch as it was, if a recording fails: until 2.12 it does not do that itself."""
        outside = torch.cuda.current_stream()
        try:
            yield
        except RuntimeError:
            torch.cuda.set_stream(outside)
            with suppress(RuntimeError):  # which says that the allocator had left the pool
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            raise
