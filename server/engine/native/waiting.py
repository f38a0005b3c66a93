"""The waiting sequences: a queue of interactive ones, and one of background work. No torch."""

from collections.abc import Iterator
from itertools import chain

from crma.core.selection import AdapterSelection
from server.engine.native.fair_queue import FairQueue
from server.engine.native.sequence import Sequence


class Waiting:
    """Both queues. Interactive sequences start first.

    Each queue also has the shares of its class, in which the running sequences count.

    Attributes:
        interactive: the sequences of interactive requests.
        background: the others.
    """

    def __init__(self) -> None:
        self.interactive = FairQueue()
        self.background = FairQueue()

    def __len__(self) -> int:
        return len(self.interactive) + len(self.background)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self.queue_of(sequence)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.interactive, self.background)

    def queue_of(self, sequence: Sequence) -> FairQueue:
        """The queue of the sequence's class."""
        return self.interactive if sequence.request.interactive else self.background

    def selections(self) -> Iterator[AdapterSelection]:
        """Yield the adapters that are needed next, in the order of the queues."""
        return chain(self.interactive.selections(), self.background.selections())

    def num_requests(self) -> int:
        """How many requests have a waiting sequence."""
        return self.interactive.num_requests + self.background.num_requests

    def tasks(self) -> set[str]:
        """The digests of the task adapters of waiting requests."""
        return self.interactive.tasks | self.background.tasks
