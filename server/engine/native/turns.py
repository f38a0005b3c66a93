"""The order in which prompts get their tokens in one step. No torch.

Owners take turns. Of one owner, the prompt that is due first comes next, whether it has begun or
waits; of those that wait, the next one is that of the least served adapter.
"""

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush

from crma.core.selection import AdapterSelection
from server.engine.native.fair_queue import FairQueue, due
from server.engine.native.sequence import Sequence


class Turns:
    """Iterates over prompts, those that have begun and those that wait, each at most once.

    The order follows the shares, which change while the prompts are planned.

    Args:
        begun: running sequences whose prompts are being computed, oldest first.
        queue: the waiting sequences of the same class, and the shares.
    """

    def __init__(self, begun: Iterable[Sequence], queue: FairQueue) -> None:
        self._queue = queue
        self._begun: dict[str, list[Sequence]] = {}  # by owner, the next one last
        for sequence in sorted(begun, key=due):
            self._begun.setdefault(sequence.request.owner, []).insert(0, sequence)
        self._starts = {owner: self._starts_of(owner) for owner in queue.lanes}
        self._heads: dict[str, Sequence] = {}  # the next start of each owner, where it is known
        self._held: set[AdapterSelection] = set()
        self._is_closed = False

    def __iter__(self) -> Iterator[Sequence]:
        owners = list(dict.fromkeys([*self._begun, *self._starts]))
        while owners:
            owner = min(owners, key=self._queue.ledger.owners.served)
            sequence = self._next(owner)
            if sequence is None:
                owners.remove(owner)
            else:
                yield sequence

    def close(self) -> None:
        """Start nothing else."""
        self._is_closed = True

    def hold(self, selection: AdapterSelection) -> None:
        """Start nothing else with these adapters."""
        self._held.add(selection)

    def _next(self, owner: str) -> Sequence | None:
        """An owner's next prompt; None: it has none left."""
        begun = self._begun.get(owner)
        start = self._head(owner)
        if begun and (start is None or due(begun[-1]) <= due(start)):
            return begun.pop()
        self._heads.pop(owner, None)
        return start

    def _head(self, owner: str) -> Sequence | None:
        """The owner's next sequence that may start, if any."""
        if self._is_closed or owner not in self._starts:
            return None
        head = self._heads.get(owner)
        while head is None or head.request.selection in self._held:
            head = next(self._starts[owner], None)
            if head is None:
                self._heads.pop(owner, None)
                return None
        self._heads[owner] = head
        return head

    def _starts_of(self, owner: str) -> Iterator[Sequence]:
        """Yield an owner's waiting sequences. The queue may lose those that were yielded."""
        lane = self._queue.lanes[owner]
        lines = {selection: line.copy() for selection, line in lane.lines.items()}
        yield from lane.returning[::-1]
        served = self._queue.ledger.adapters[owner].served
        heads = [(served(selection), line[0], 0) for selection, line in lines.items()]
        heapify(heads)
        while heads:
            _, place, index = heappop(heads)
            selection = place.sequence.request.selection
            yield place.sequence
            index += 1
            if selection not in self._held and index < len(lines[selection]):
                heappush(heads, (served(selection), lines[selection][index], index))
