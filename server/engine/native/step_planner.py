"""Plans one step: how many tokens each sequence computes, and which are preempted. No torch."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from server.engine.native.block_tables import BlockTables
from server.engine.native.sequence import Sequence
from server.engine.native.step import Chunk, Step
from server.engine.native.turns import Turns
from server.engine.native.waiting import Waiting

logger = logging.getLogger(__name__)


class Admission(Enum):
    """The engine's answer for a waiting sequence that there is room for."""

    NOW = "now"  # its adapters are resident, and now in use
    LATER = "later"  # it waits for an adapter; others may overtake it
    HOLD = "hold"  # it has been overtaken too often: none behind it may start before it


Admit = Callable[[Sequence], Admission]


@dataclass(frozen=True, slots=True)
class _Place:
    """Room for a sequence to start in: its cached blocks, and the sequences to preempt for it."""

    cached: list[int]
    victims: list[Sequence]


@dataclass(eq=False)
class StepPlanner:
    """A step while it is planned: the tokens left in its budget, and the sequences that it changes.

    It moves sequences between the scheduler's two queues, and allocates their blocks, as it goes.
    What raises for one sequence is that sequence's fault; the others are planned.

    Args:
        waiting: the scheduler's queues, with the shares to which planned tokens are charged.
        running: the scheduler's running sequences, oldest first.
        tables: the blocks of the running sequences.
        max_num_seqs: sequences that run at once.
        tokens_left: the budget of the step, less the tokens planned so far.
        prompt_logits_left: how many logits of prompts are still computed, each as long as the
            vocabulary. Log-probabilities of a long prompt take several steps.
        admit: asked for each sequence that there is room for, in order.
    """

    waiting: Waiting
    running: list[Sequence]
    tables: BlockTables
    max_num_seqs: int
    tokens_left: int
    prompt_logits_left: int
    admit: Admit
    _chunks: dict[Sequence, Chunk] = field(default_factory=dict, init=False)
    _new_blocks: list[int] = field(default_factory=list, init=False)
    _preempted: list[Sequence] = field(default_factory=list, init=False)
    _failed: list[Sequence] = field(default_factory=list, init=False)
    _passed_over: list[Sequence] = field(default_factory=list, init=False)
    _is_closed: bool = field(default=False, init=False)  # nothing else starts in this step
    _reserved: int | None = field(default=None, init=False)

    def step(self) -> Step:
        """Return the step as planned so far."""
        return Step(list(self._chunks.values()), self._new_blocks, self._preempted, self._failed)

    def continue_running(self, sequences: list[Sequence]) -> None:
        """Plan the next tokens of running sequences, in order, as far as the budget goes."""
        for sequence in sequences:
            if sequence not in self._preempted:
                self._plan(sequence, self._continue)

    def plan_prompts(self, turns: Turns) -> None:
        """Plan prompts, those that have begun and those that wait, as far as the budget goes.

        Waiting sequences start until there is no room for one of them. None starts if the step has
        preempted a sequence before: blocks are short then.
        """
        if self._is_closed or self._preempted:
            turns.close()
        for sequence in turns:
            if sequence in self.running:
                self._plan(sequence, self._continue)
            elif sequence not in self._preempted:
                self._plan(sequence, self._try_to_start)
            if self._is_closed:
                turns.close()
            elif self._passed_over:
                turns.hold(self._passed_over[-1].request.selection)

    def _plan(self, sequence: Sequence, plan: Callable[[Sequence], None]) -> None:
        """Plan one sequence. A fault is pinned to it."""
        try:
            plan(sequence)
        except Exception:
            logger.exception("request %s cannot be planned", sequence.request.id)
            self._failed.append(sequence)

    def _continue(self, sequence: Sequence) -> None:
        count = self._most_tokens(sequence)
        if count and self._allocate_or_preempt(sequence, count):
            self._add_chunk(sequence, count)

    def _try_to_start(self, sequence: Sequence) -> None:
        """Start a waiting sequence; without room for it, no other starts before it."""
        if self._is_prompt_in_progress(sequence) or self._lacks_logits(sequence):
            return
        place = self._find_place(sequence)
        admission = Admission.HOLD if place is None else self.admit(sequence)
        if place is None or admission is Admission.HOLD:
            self._is_closed = True
        elif admission is Admission.LATER:
            self._passed_over.append(sequence)
        else:
            self._start(sequence, place)

    def _is_prompt_in_progress(self, sequence: Sequence) -> bool:
        """Whether another of the request's n sequences is computing the prompt that they share.

        Waiting for it is cheaper than computing the prompt twice: its blocks can then be shared.
        """
        if self.tables.root_of is None:
            return False
        if len(sequence.request.prompt_ids) <= self.tables.pool.block_size:
            return False  # too short to share a block: the last token is always computed
        return any(s.request is sequence.request and s.is_prefilling for s in self.running)

    def _lacks_logits(self, sequence: Sequence) -> bool:
        """Whether the sequence needs logits of its prompt, and the step has none left."""
        return sequence.wants_prompt_logprobs and self.prompt_logits_left == 0

    def _most_tokens(self, sequence: Sequence) -> int:
        """How many tokens of a sequence the step can still compute."""
        count = min(sequence.num_pending_tokens, self.tokens_left)
        if not sequence.wants_prompt_logprobs:
            return count
        num_without_logits = max(0, sequence.first_logits - sequence.num_computed_tokens)
        return min(count, num_without_logits + self.prompt_logits_left)

    def _find_place(self, sequence: Sequence) -> _Place | None:
        """Find room for a waiting sequence; None if it has to wait."""
        cached = self.tables.find_cached(sequence)
        victims = self._find_victims(sequence, cached)
        if victims is None:
            return None
        planned = [self._chunks[victim] for victim in victims if victim in self._chunks]
        if self.tokens_left + sum(chunk.count for chunk in planned) == 0:
            return None
        return _Place(cached, victims)

    def _find_victims(self, sequence: Sequence, cached: list[int]) -> list[Sequence] | None:
        """Choose the running sequences to preempt so that a waiting one finds room.

        Background work gives way to an interactive sequence, and of two owners of the same class
        the one that runs more sequences to the other.

        Returns:
            The sequences, often none; None if preempting would not make enough room.
        """
        num_blocks = self.tables.pool.blocks_for(len(sequence.token_ids))
        num_new_blocks = num_blocks - len(cached)
        kept = list(self.running)
        victims: list[Sequence] = []
        while not self._has_room(num_new_blocks, cached, kept):
            victim = _first_to_give_way(kept, sequence)
            if victim is None:
                return None
            kept.remove(victim)
            victims.append(victim)
        return victims

    def _has_room(self, num_new_blocks: int, cached: list[int], kept: list[Sequence]) -> bool:
        """Whether a sequence with some cached blocks could start if only `kept` went on running."""
        if len(kept) >= self.max_num_seqs:
            return False
        if len(kept) == len(self.running):
            num_free = self.tables.pool.num_free_beside(cached)
            return num_new_blocks + self._num_reserved() <= num_free
        used = set(cached).union(*(other.block_table for other in kept))
        num_free = self.tables.pool.capacity - len(used)
        return num_new_blocks + self._num_reserved_by(kept) <= num_free

    def _num_reserved(self) -> int:
        """As `_num_reserved_by` for all running sequences, kept until one of them changes: each
        line of the queue asks."""
        if self._reserved is None:
            self._reserved = self._num_reserved_by(self.running)
        return self._reserved

    def _num_reserved_by(self, kept: list[Sequence]) -> int:
        """How many blocks are kept for running sequences.

        Each soon needs one more, and a prompt that has begun its others: without them, the new
        sequence would be preempted at once.
        """
        return sum(1 + self.tables.num_missing(other) for other in kept)

    def _start(self, sequence: Sequence, place: _Place) -> None:
        """Make room for an admitted sequence, move it to the running ones and plan its tokens."""
        # First: of what fails below, the engine has to know that its adapters are in use.
        self.waiting.queue_of(sequence).remove(sequence)
        self.running.append(sequence)
        self._reserved = None
        for other in self._passed_over:
            other.num_overtaken += 1
        for victim in place.victims:
            self._preempt(victim)
        self.tables.share(sequence, place.cached)
        if sequence.first_scheduled is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        count = self._most_tokens(sequence)
        self._allocate(sequence, count)
        self._add_chunk(sequence, count)

    def _allocate_or_preempt(self, sequence: Sequence, count: int) -> bool:
        """Allocate the blocks for `count` more tokens; preempt sequences until there are enough.

        Returns:
            False if the sequence itself had to be preempted.
        """
        while not self._allocate(sequence, count):
            self._is_closed = True
            victim = _first_to_preempt(self.running)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        """Allocate the blocks for `count` more tokens; False if too few are free."""
        self._reserved = None
        blocks = self.tables.allocate(sequence, count)
        if blocks is None:
            return False
        self._new_blocks += blocks
        return True

    def _add_chunk(self, sequence: Sequence, count: int) -> None:
        chunk = Chunk(sequence, sequence.num_computed_tokens, count)
        self._charge(chunk, 1)
        self._chunks[sequence] = chunk

    def _preempt(self, victim: Sequence) -> None:
        """Move a running sequence to the head of the queue; its tokens go back to the budget."""
        self._reserved = None
        self.running.remove(victim)
        self.tables.free(victim)
        self.waiting.queue_of(victim).add_returning(victim)
        self._preempted.append(victim)
        chunk = self._chunks.pop(victim, None)
        if chunk is not None:
            self._charge(chunk, -1)

    def _charge(self, chunk: Chunk, sign: int) -> None:
        """Take a chunk from what is left of the step and of its owner's share; -1: give it back."""
        self.tokens_left -= sign * chunk.count
        self.prompt_logits_left -= sign * chunk.num_prompt_logits
        queue = self.waiting.queue_of(chunk.sequence)
        queue.ledger.charge(chunk.sequence, sign * chunk.count)


def _first_to_preempt(running: list[Sequence]) -> Sequence:
    """Return the newest sequence that is not interactive, or else the newest."""
    for sequence in reversed(running):
        if not sequence.request.interactive:
            return sequence
    return running[-1]


def _first_to_give_way(running: list[Sequence], waiting: Sequence) -> Sequence | None:
    """Return the running sequence to preempt so that a waiting one can start; None: no one.

    An owner gives way only to one that would not run more sequences afterwards: otherwise the two
    would preempt each other in turns.
    """
    if waiting.request.interactive:
        background = [other for other in running if not other.request.interactive]
        if background:
            return background[-1]
    alike = [s for s in running if s.request.interactive == waiting.request.interactive]
    num_running = Counter(other.request.owner for other in alike)
    for other in reversed(alike):
        fewest = num_running[other.request.owner] - 1
        if fewest > num_running[waiting.request.owner] and fewest + 1 == max(num_running.values()):
            return other
    return None
