"""Threads for work that may never end, such as reading a file system that has gone."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from crma.models.loading import compute_alone

T = TypeVar("T")


class DaemonThreads:
    """Runs each piece of work in a thread of its own, for which the end of the process does not
    wait.

    Python ends such a thread wherever it is, and C++ then aborts the process. So whoever stops has
    to `wait` first, and only work that really hangs is left behind.
    """

    def __init__(self) -> None:
        self._ended: set[asyncio.Future[None]] = set()  # not set yet: one a running thread

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work`. If the caller is cancelled, it goes on and its result is dropped."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        ended: asyncio.Future[None] = loop.create_future()
        self._ended.add(ended)
        ended.add_done_callback(self._ended.discard)

        def finish(result: T | None, error: BaseException | None) -> None:
            ended.set_result(None)
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]  # None only beside an error

        def run() -> None:
            compute_alone()
            result: T | None = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # the loop has ended, and with it everyone who waits
                loop.call_soon_threadsafe(finish, result, error)

        threading.Thread(target=run, name="daemon", daemon=True).start()
        return await done

    async def wait(self, timeout_s: float) -> None:
        """Wait until all work has ended, for at most some seconds."""
        if self._ended:
            await asyncio.wait(self._ended, timeout=timeout_s)
