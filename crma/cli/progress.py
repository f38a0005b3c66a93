"""The progress of a command on stderr: bars on a terminal, otherwise a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crma.cli.output import console, note

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Report = Callable[[str, int, int], None]  # (description, done, total)
INTERVAL_S = 10.0


@dataclass
class ProgressLines:
    """Writes a line when something begins and ends, and at most one every `interval_s` between.

    Args:
        write: called with each line.
        clock: the time in seconds.
    """

    write: Callable[[str], object]
    clock: Callable[[], float] = time.monotonic
    interval_s: float = INTERVAL_S
    # description -> when it was last written, and how much was done
    _written: dict[str, tuple[float, int | None]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def report(self, description: str, done: int, total: int) -> None:
        """Write how far something is, unless its last line is younger than `interval_s`."""
        now = self.clock()
        when, before = self._written.get(description, (-self.interval_s, None))
        is_due = now - when >= self.interval_s
        if done == before or not (is_due or done == total):
            return
        self._written[description] = (now, done)
        self.write(f"{description}: {done} of {total}, after {now - self._started:.0f} s")


@contextmanager
def progress(*begun: str, first: str = "loading the model") -> Iterator[Report]:
    """Show progress in the block, for which it returns the function to report with.

    Args:
        begun: descriptions that have a bar of their own from the start. All others share one.
        first: what is said until something is reported.
    """
    if not console().is_terminal:
        note(first)
        yield ProgressLines(note).report
        return
    from rich.markup import escape  # here, because `--help` does not need rich

    with _bars() as bars:
        own: dict[str, TaskID] = {each: bars.add_task(escape(each)) for each in begun}
        shared = bars.add_task(escape(first), total=None)

        def report(description: str, done: int, total: int) -> None:
            bar = own.get(description, shared)
            bars.update(bar, description=escape(description), completed=done, total=total)

        yield report


def _bars() -> "Progress":
    """Bars with the elapsed and the remaining time."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
    )
