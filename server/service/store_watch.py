"""Looks at a store again and again, whatever becomes of it: it may be damaged, gone, or hang."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from crma.core.errors import CrmaError, StoreError
from crma.core.files import LOCK
from crma.store.channels import CHANNELS
from crma.store.version_stamp import file_stamp
from server.service.metrics import Metrics

log = logging.getLogger("server")


class StoreProblems:
    """The problems of a store, in the log and in the metrics.

    Args:
        metrics: of the app.

    Attributes:
        current: why the store as a whole cannot be read now; None if it can.
        source: why the store is not all that another machine has, of which it is a copy.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.current: str | None = None
        self.source: tuple[str, ...] = ()
        self._metrics = metrics
        self._num_refused = 0

    def report(self, problem: CrmaError) -> None:
        """Log and count a problem that was found."""
        log.error("adapter store: %s", problem.message)
        self._metrics.verification_failures.inc()

    def set(self, problem: CrmaError | None) -> None:
        """The store cannot be read because of `problem`, which is reported once; or can be read."""
        before = self.current
        self.current = None if problem is None else problem.message
        if problem is not None and problem.message != before:
            self.report(problem)
        if problem is None and before is not None:
            log.info("the adapter store can be read again")
        self.count(self._num_refused)

    def set_source(self, problems: Sequence[CrmaError]) -> None:
        """A store cannot be copied, or not whole, because of `problems`; or it is a whole copy.

        Each problem is reported once.
        """
        before = self.source
        self.source = tuple(each.message for each in problems)
        for problem in problems:
            if problem.message not in before:
                self.report(problem)
        if before and not problems:
            log.info("the adapter store is a whole copy again")
        self.count(self._num_refused)

    @property
    def shown(self) -> str | None:
        """One problem of the store as a whole, if there is any."""
        return self.current or next(iter(self.source), None)

    def count(self, num_refused: int) -> None:
        """Show how many problems there are now, given how many versions may not serve."""
        self._num_refused = num_refused
        num_whole = (self.current is not None) + len(self.source)
        self._metrics.store_problems.set(num_refused + num_whole)


def fingerprint(root: Path) -> object:
    """A value that changes when a writer has held the store's lock, or its folders change.

    It takes no longer however much the store holds.
    """
    try:
        (root / CHANNELS).stat()
    except OSError as error:
        return error.errno
    return [file_stamp(root / name) for name in (CHANNELS, LOCK, "", "tasks", "backbones")]


def check_still_there(root: Path) -> None:
    """Raises StoreError if a store that has been read holds no channels any more.

    To a reader that is an empty store, and every task would stop: but what is gone by mistake, or
    with its disk, comes back.
    """
    if not os.path.lexists(root / CHANNELS):
        where = root / CHANNELS if root.exists() else root
        message = f"{where} has gone: what served goes on serving. Bring it back, or restart"
        raise StoreError(message, field="store", value=str(root), allowed="the store as it was")


async def with_patience(
    looking: Awaitable[None], patience_s: float, problems: StoreProblems
) -> None:
    """Wait for a look at the store. That it takes longer than `patience_s` seconds is a problem.

    There is no second look meanwhile: it would wait for the same file system.
    """
    look = asyncio.ensure_future(looking)
    try:
        done, _ = await asyncio.wait({look}, timeout=patience_s)
        message = f"the store has not answered for {patience_s:g} s: what served goes on serving"
        if not done:
            problems.set(StoreError(message, field="store", allowed="a file system that answers"))
        await look
        if problems.current == message:
            problems.set(None)
    finally:
        look.cancel()


async def watch(
    refresh: Callable[[], Awaitable[None]],
    poll_s: float,
    patience_s: float,
    problems: StoreProblems,
) -> None:
    """Look at the store every `poll_s` seconds, for ever."""
    while True:
        await asyncio.sleep(poll_s)
        try:
            await with_patience(refresh(), patience_s, problems)
        except Exception:
            log.exception("the adapter store cannot be read; the last view keeps serving")


async def follow(
    copy: Callable[[], Awaitable[Sequence[CrmaError]]], poll_s: float, problems: StoreProblems
) -> None:
    """Copy a store on another machine every `poll_s` seconds, for ever.

    A copy may take its time: nobody waits for it, and what served goes on serving meanwhile.
    """
    while True:
        await asyncio.sleep(poll_s)
        try:
            problems.set_source(await copy())
        except Exception:
            log.exception("the adapter store cannot be copied; what is here goes on serving")
