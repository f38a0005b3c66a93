"""A queue that many owners share fairly, however much each of them asks for."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Ticket(Generic[T]):
    """An item that waits.

    Attributes:
        owner: whose it is.
        cost: the work that it takes.
        start, finish: when it would begin and end, in units of work, if every owner had a worker
            of its own, all equally slow.
        item: what waits.
    """

    owner: str
    cost: float
    start: float
    finish: float
    item: T


class FairQueue(Generic[T]):
    """Start-time and finish tags as in weighted fair queueing (Demers, Keshav & Shenker 1989).

    The item comes first that would end first if every owner had a worker of its own. So a small
    item of one owner never waits for many large ones of another, and nobody waits for ever.
    """

    def __init__(self) -> None:
        self._waiting: list[Ticket[T]] = []
        self._last: dict[str, float] = {}  # the finish of an owner's last item
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, owner: str, cost: float, item: T) -> Ticket[T]:
        """Let an item wait. Returns its ticket."""
        start = max(self._now, self._last.get(owner, 0.0))
        ticket = Ticket(owner, cost, start, start + cost, item)
        self._last[owner] = ticket.finish
        self._waiting.append(ticket)
        return ticket

    def pop(self, max_cost: float = math.inf) -> T | None:
        """Take the next item of at most this cost; None if there is none."""
        fitting = [each for each in self._waiting if each.cost <= max_cost]
        if not fitting:
            return None
        ticket = min(fitting, key=lambda each: each.finish)  # the first of equals
        self._now = max(self._now, min(each.start for each in self._waiting))
        self._waiting.remove(ticket)
        self._forget()
        return ticket.item

    def remove(self, ticket: Ticket[T]) -> None:
        """Take out an item that waits no more: its owner is not charged for it.

        Nothing happens if it has left already.
        """
        if ticket not in self._waiting:
            return
        self._waiting.remove(ticket)
        self._last[ticket.owner] -= ticket.cost
        for later in self._waiting:
            if later.owner == ticket.owner and later.start >= ticket.finish:
                later.start -= ticket.cost
                later.finish -= ticket.cost
        self._forget()

    def _forget(self) -> None:
        """An owner that is not ahead is as good as new."""
        owners = {each.owner for each in self._waiting}
        for owner in [name for name, last in self._last.items() if last <= self._now]:
            if owner not in owners:
                del self._last[owner]

    def newest_of_greediest(self, owner: str) -> Ticket[T] | None:
        """The newest item of the owner with most items; None if no other has more than `owner`."""
        counts = Counter(each.owner for each in self._waiting)
        greediest, most = max(counts.items(), key=lambda each: each[1], default=("", 0))
        if most <= counts[owner]:
            return None
        return next(each for each in reversed(self._waiting) if each.owner == greediest)
