"""Who has had how many tokens: the members of a group take turns, and the least served comes next.

These are the virtual token counters of Sheng et al., "Fairness in Serving Large Language Models"
(OSDI 2024): deficit round robin whose quantum is one chunk of one step. No torch.
"""

from collections import Counter
from collections.abc import Hashable

from server.engine.native.sequence import Sequence


class Shares:
    """The tokens of each member of a group.

    A member is present while it has something to do. One that comes is counted as served as much as
    the least served of those that are present, so that nobody saves up turns while away.
    """

    def __init__(self) -> None:
        self._served: dict[Hashable, int] = {}
        self._num_open: Counter[Hashable] = Counter()

    def enter(self, member: Hashable) -> None:
        """One more sequence of a member."""
        if member not in self._num_open:
            floor = min((self._served[other] for other in self._num_open), default=0)
            self._served[member] = max(self._served.get(member, 0), floor)
        self._num_open[member] += 1

    def leave(self, member: Hashable) -> None:
        """One sequence less. What a member had more than others counts while they are present."""
        self._num_open[member] -= 1
        if self._num_open[member]:
            return
        del self._num_open[member]
        floor = min((self._served[other] for other in self._num_open), default=None)
        for other in [each for each in self._served if each not in self._num_open]:
            if floor is None or self._served[other] <= floor:
                del self._served[other]

    def charge(self, member: Hashable, num_tokens: int) -> None:
        """Count tokens that a present member gets; a negative number gives them back."""
        self._served[member] += num_tokens

    def served(self, member: Hashable) -> int:
        """The tokens of a present member."""
        return self._served[member]

    def __len__(self) -> int:
        """How many members are present."""
        return len(self._num_open)


class Ledger:
    """The shares of the owners of requests, and of the adapters among the requests of each."""

    def __init__(self) -> None:
        self.owners = Shares()
        self.adapters: dict[str, Shares] = {}

    def enter(self, sequence: Sequence) -> None:
        """A sequence has come."""
        request = sequence.request
        self.owners.enter(request.owner)
        self.adapters.setdefault(request.owner, Shares()).enter(request.selection)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        request = sequence.request
        self.owners.leave(request.owner)
        adapters = self.adapters[request.owner]
        adapters.leave(request.selection)
        if not len(adapters):
            del self.adapters[request.owner]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens that a sequence computes in a step; a negative number gives them back."""
        request = sequence.request
        self.owners.charge(request.owner, num_tokens)
        self.adapters[request.owner].charge(request.selection, num_tokens)
