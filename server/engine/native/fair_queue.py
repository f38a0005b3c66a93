"""The queue: waiting sequences by owner and adapters. No torch.

Owners take turns, and so do the adapters of an owner (shares.py). Among the requests of one owner
with the same adapters, the one that is due first is next. A prompt is due later the longer it is: a
short one overtakes a long one that arrived before it, but only for a limited time.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from crma.core.selection import AdapterSelection
from server.engine.native.sequence import Sequence
from server.engine.native.shares import Ledger

SECONDS_A_TOKEN = 0.005  # a prompt of 2,000 tokens is due 10 s after its arrival


def due(sequence: Sequence) -> float:
    """When a prompt should have been computed, as a time of the engine's clock, in seconds."""
    return sequence.request.arrival + sequence.num_pending_tokens * SECONDS_A_TOKEN


class _Place(NamedTuple):
    """A place in a line: the earliest due first, of those the one that came first."""

    due: float
    number: int
    sequence: Sequence


@dataclass(eq=False)
class Lane:
    """The waiting sequences of one owner.

    Attributes:
        returning: those that were preempted; the last one returns first.
        lines: the others, by their adapters, in order.
    """

    returning: list[Sequence] = field(default_factory=list)
    lines: dict[AdapterSelection, list[_Place]] = field(default_factory=dict)


class FairQueue:
    """The waiting sequences of one class: interactive ones, or background work.

    Attributes:
        ledger: the shares of all sequences of the class, waiting and running.
        lanes: the waiting ones, by owner.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.lanes: dict[str, Lane] = {}
        self._places: dict[Sequence, _Place | None] = {}  # None: it returns
        self._num_added = 0
        self._requests: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._places

    def __iter__(self) -> Iterator[Sequence]:
        """Yield all: owner by owner, the least served first."""
        for owner in sorted(self.lanes, key=self.ledger.owners.served):
            yield from reversed(self.lanes[owner].returning)
            for selection in self._lines(owner):
                for place in self.lanes[owner].lines[selection]:
                    yield place.sequence

    @property
    def num_requests(self) -> int:
        """How many requests have a sequence here."""
        return len(self._requests)

    @property
    def tasks(self) -> set[str]:
        """The digests of their task adapters."""
        return set(self._tasks)

    def selections(self) -> Iterator[AdapterSelection]:
        """Yield the adapters that are needed next, in the order of the queue."""
        for owner in sorted(self.lanes, key=self.ledger.owners.served):
            for sequence in reversed(self.lanes[owner].returning):
                yield sequence.request.selection
            yield from self._lines(owner)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has come."""
        self._num_added += 1
        place = _Place(due(sequence), self._num_added, sequence)
        self._places[sequence] = place
        lines = self._lane(sequence).lines
        insort(lines.setdefault(sequence.request.selection, []), place)
        self._count(sequence, 1)

    def add_returning(self, sequence: Sequence) -> None:
        """Queue a sequence that was preempted, before all others of its owner."""
        self._places[sequence] = None
        self._lane(sequence).returning.append(sequence)
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        owner, selection = sequence.request.owner, sequence.request.selection
        lane = self.lanes[owner]
        place = self._places.pop(sequence)
        if place is None:
            lane.returning.remove(sequence)
        else:
            line = lane.lines[selection]
            del line[bisect_left(line, place)]
            if not line:
                del lane.lines[selection]
        if not lane.returning and not lane.lines:
            del self.lanes[owner]
        self._count(sequence, -1)

    def _lane(self, sequence: Sequence) -> Lane:
        return self.lanes.setdefault(sequence.request.owner, Lane())

    def _lines(self, owner: str) -> list[AdapterSelection]:
        """The adapters of an owner's lines: the least served first, then the one that is due."""
        served = self.ledger.adapters[owner].served
        lines = self.lanes[owner].lines
        return sorted(lines, key=lambda selection: (served(selection), lines[selection][0][:2]))

    def _count(self, sequence: Sequence, change: int) -> None:
        """Keep the numbers of waiting sequences of a request and of a task, without zeros."""
        counts: list[tuple[Counter[str], str | None]] = [
            (self._requests, sequence.request.id),
            (self._tasks, sequence.request.selection.task_digest),
        ]
        for counter, key in counts:
            if key is None:
                continue
            counter[key] += change
            if not counter[key]:
                del counter[key]
