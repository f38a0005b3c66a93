"""Which sequences the next step runs. Plain data, no torch.

First come, first served: a step prefills what fits of the waiting, or, when none fits, decodes everything that runs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Step:
    """What to run: whole prompts (`is_prefill`), or one token for each sequence."""

    sequences: tuple[Sequence, ...]
    is_prefill: bool


class Scheduler:
    """Two queues and two limits.

    max_num_seqs: sequences that run at once (= slots in the KV cache).
    max_num_batched_tokens: padded prompt tokens of one prefill; a longer prompt runs alone.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs))

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def has_work(self) -> bool:
        """True while anything waits or runs."""
        return bool(self.waiting or self.running)

    def schedule(self) -> Step:
        """Choose the next step; moves what it prefills from waiting to running and gives it a slot."""
        admitted: list[Sequence] = []
        width = 0
        while self.waiting and self._free_slots:
            width = max(width, len(self.waiting[0].request.prompt_ids))
            if admitted and width * (len(admitted) + 1) > self.max_num_batched_tokens:
                break
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            admitted.append(sequence)
        self.running += admitted
        return Step(tuple(admitted or self.running), is_prefill=bool(admitted))

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out, wherever it is, and free its slot."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None

    def find(self, request_id: str) -> list[Sequence]:
        """Every unfinished sequence of a request."""
        return [s for queue in (self.waiting, self.running) for s in queue if s.request.id == request_id]

    def check_integrity(self) -> None:
        """AssertionError unless every slot is free or used by exactly one running sequence, by nothing that waits."""
        used = [s.slot for s in self.running]
        assert sorted([*self._free_slots, *(slot for slot in used if slot is not None)]) == list(
            range(self.max_num_seqs)
        )
        assert all(s.slot is None for s in self.waiting)
        assert not any(s.is_finished for queue in (self.waiting, self.running) for s in queue)
