"""The progress of a command on stderr: bars on a terminal, otherwise a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from crma.cli.output import console, note

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
    _written: dict[str, float] = field(default_factory=dict, init=False)  # description -> when

    def __post_init__(self) -> None:
        self._started = self.clock()

    def report(self, description: str, done: int, total: int) -> None:
        """Write how far something is, unless its last line is younger than `interval_s`."""
        now = self.clock()
        is_due = now - self._written.get(description, -self.interval_s) >= self.interval_s
        if not is_due and description in self._written and done < total:
            return
        self._written[description] = now
        self.write(f"{description}: {done} of {total}, after {now - self._started:.0f} s")


@contextmanager
def progress(*begun: str) -> Iterator[Report]:
    """Show progress in the block, for which it returns the function to report with.

    Args:
        begun: descriptions that have a bar of their own from the start. All others share one.
    """
    if not console.is_terminal:
        note("loading the model")
        lines = ProgressLines(lambda line: note(escape(line)))
        yield lines.report
        return
    with _bars() as bars:
        own: dict[str, TaskID] = {description: bars.add_task(description) for description in begun}
        shared = bars.add_task("loading the model", total=None)

        def report(description: str, done: int, total: int) -> None:
            bar = own.get(description, shared)
            bars.update(bar, description=description, completed=done, total=total)

        yield report


def _bars() -> Progress:
    """Bars with the elapsed and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
