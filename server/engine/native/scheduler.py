"""What the next step computes. Plain data, no torch.

One budget of tokens a step over all sequences: those that decode take one each, what is left goes to prompts, oldest
first, in chunks. There are no phases. First come, first served; who can't be served yet because of an adapter is passed
by others, but not for ever. What is interactive goes before what is not, which gives way to it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from crma.core.selection import AdapterSelection
from server.engine.native.block_pool import BlockPool, Key, next_key
from server.engine.native.sequence import Sequence


class Admission(Enum):
    """What the engine says of a sequence that could start."""

    NOW = "now"
    LATER = "later"  # others may pass
    HOLD = "hold"  # it has been passed too often: nobody behind it starts before it


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a sequence from position `start`; the next token is sampled if they are its last."""

    sequence: Sequence
    start: int
    count: int

    @property
    def stop(self) -> int:
        """The position after its last token."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the newest token."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def num_logits(self) -> int:
        """Of how many of its last tokens the logits are needed. Those at a position are of the token after it."""
        if not self.sequence.wants_prompt_logprobs:
            return int(self.samples)
        return max(
            int(self.samples),
            self.stop - max(self.start, self.sequence.request.sampling.prompt_logprobs_from - 1),
        )


@dataclass
class Step:
    """What to run, the blocks that are new in it, and who had to give way."""

    chunks: list[Chunk] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


@dataclass(eq=False)
class Scheduler:
    """Two queues and the blocks; `running` has the oldest first.

    max_num_seqs: sequences that run at once.
    max_num_batched_tokens: tokens of one step; at least max_num_seqs, so that everything that decodes can.
    root_of: the key that a selection's chains of blocks start from; None: no prefix is shared.
    """

    blocks: BlockPool
    max_num_seqs: int
    max_num_batched_tokens: int
    root_of: Callable[[AdapterSelection], Key] | None = None
    waiting: deque[Sequence] = field(default_factory=deque, init=False)
    running: list[Sequence] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        assert self.max_num_seqs <= self.max_num_batched_tokens

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def schedule(self, admit: Callable[[Sequence], Admission]) -> Step:
        """Choose the next step, and give what it computes its blocks.

        Args:
            admit: asked for each sequence for which there is room, in order; `NOW` takes its adapters.
        """
        step, passed = Step(), list[Sequence]()
        running = sorted(self.running, key=lambda s: s.num_pending_tokens > 1)
        is_last = [s.num_pending_tokens > 1 and not s.request.interactive for s in running]
        self._go_on([s for s, last in zip(running, is_last, strict=True) if not last], step)
        may_start = self._start(
            [s for s in self.waiting if s.request.interactive], step, admit, passed
        )
        self._go_on([s for s, last in zip(running, is_last, strict=True) if last], step)
        if may_start:
            self._start([s for s in self.waiting if not s.request.interactive], step, admit, passed)
        return step

    def computed(self, step: Step) -> None:
        """The step has run: its tokens are in the cache, and full blocks can be shared."""
        size = self.blocks.block_size
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.num_computed_tokens = chunk.stop
            if self.root_of is not None:
                for i in range(chunk.start // size, chunk.stop // size):
                    self.blocks.remember(sequence.block_table[i], self._keys(sequence, i + 1)[i])

    def remove(self, sequence: Sequence) -> bool:
        """Take a finished sequence out, wherever it is, and free its blocks. True if it was running."""
        is_running = sequence in self.running
        (self.running if is_running else self.waiting).remove(sequence)
        self._free(sequence)
        return is_running

    def unfinished(self) -> list[Sequence]:
        """Everything that runs or waits."""
        return [*self.running, *self.waiting]

    def check_integrity(self) -> None:
        """AssertionError unless blocks and sequences agree: whoever waits has none, whoever runs those it needs."""
        self.blocks.check_integrity([s.block_table for s in self.running])
        assert len(self.running) <= self.max_num_seqs
        assert not set(self.running) & set(self.waiting)
        assert not any(s.block_table or s.num_computed_tokens for s in self.waiting)
        for s in self.running:
            assert 0 <= s.num_computed_tokens < len(s.token_ids)
            assert len(s.block_table) >= self.blocks.blocks_for(s.num_computed_tokens)

    def _budget(self, step: Step) -> int:
        return self.max_num_batched_tokens - sum(chunk.count for chunk in step.chunks)

    def _go_on(self, sequences: list[Sequence], step: Step) -> None:
        """The next tokens of what runs."""
        for sequence in sequences:
            count = min(sequence.num_pending_tokens, self._budget(step))
            if count and sequence not in step.preempted and self._make_room(sequence, count, step):
                step.chunks.append(Chunk(sequence, sequence.num_computed_tokens, count))

    def _start(
        self,
        waiting: list[Sequence],
        step: Step,
        admit: Callable[[Sequence], Admission],
        passed: list[Sequence],
    ) -> bool:
        """Start what there is room for, in order. `passed`: who could not yet. Returns whether others may follow."""
        if step.preempted:
            return False
        for sequence in waiting:
            if self._leader_computes(sequence):
                continue  # its prompt will be in the cache
            cached = self._cached_blocks(sequence)
            victims = self._victims(sequence, cached)
            if victims is None:
                return False
            if not self._budget(step) + sum(
                chunk.count for chunk in step.chunks if chunk.sequence in victims
            ):
                return False
            admission = admit(sequence)
            if admission is Admission.HOLD:
                return False
            if admission is Admission.LATER:
                passed.append(sequence)
                continue
            for other in passed:
                other.num_overtaken += 1
            for victim in victims:
                self._preempt(victim, step)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.blocks.share(cached)
            sequence.block_table = cached
            sequence.num_computed_tokens = len(cached) * self.blocks.block_size
            if sequence.first_scheduled is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            count = min(sequence.num_pending_tokens, self._budget(step))
            self._grow(sequence, count, step)
            step.chunks.append(Chunk(sequence, sequence.num_computed_tokens, count))
        return not step.preempted

    def _victims(self, sequence: Sequence, cached: list[int]) -> list[Sequence] | None:
        """Who has to give way for it to start, its beginning being in the blocks `cached`; None: it has to wait."""
        new, kept = (
            self.blocks.blocks_for(len(sequence.token_ids)) - len(cached),
            list(self.running),
        )
        victims: list[Sequence] = []
        while True:
            free = self.blocks.capacity - len(
                {*cached, *(block for s in kept for block in s.block_table)}
            )
            # Each that runs needs a block soon: who starts should not have to give way at once.
            if len(kept) < self.max_num_seqs and new + len(kept) <= free:
                return victims
            if not sequence.request.interactive or not any(not s.request.interactive for s in kept):
                return None
            victims.append(_last_to_keep(kept))
            kept.remove(victims[-1])

    def _make_room(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Blocks for `count` more tokens; others give way for it, at last it itself: then False."""
        while not self._grow(sequence, count, step):
            victim = _last_to_keep(self.running)
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence, step: Step) -> None:
        self.running.remove(victim)
        self._free(victim)
        self.waiting.appendleft(victim)
        step.preempted.append(victim)
        step.chunks = [chunk for chunk in step.chunks if chunk.sequence is not victim]

    def _grow(self, sequence: Sequence, count: int, step: Step) -> bool:
        missing = self.blocks.blocks_for(sequence.num_computed_tokens + count) - len(
            sequence.block_table
        )
        new = self.blocks.allocate(max(0, missing))
        if new is None:
            return False
        sequence.block_table += new
        step.new_blocks += new
        return True

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table, sequence.num_computed_tokens = [], 0

    def _leader_computes(self, sequence: Sequence) -> bool:
        """Whether another of the request's n still computes the prompt that this one would share."""
        if self.root_of is None or len(sequence.request.prompt_ids) <= self.blocks.block_size:
            return False
        return any(s.request is sequence.request and s.num_pending_tokens > 1 for s in self.running)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its beginning already. The last token is always computed: its logits are needed."""
        if self.root_of is None:
            return []
        most = len(sequence.token_ids) - 1
        if sequence.wants_prompt_logprobs:
            most = min(most, sequence.request.sampling.prompt_logprobs_from - 1)
        most //= self.blocks.block_size
        return self.blocks.find(self._keys(sequence, most)[:most])

    def _keys(self, sequence: Sequence, count: int) -> list[Key]:
        """At least the first `count` keys of its full blocks."""
        assert self.root_of is not None
        keys, size = sequence.block_keys, self.blocks.block_size
        while len(keys) < count:
            before = keys[-1] if keys else self.root_of(sequence.request.selection)
            keys.append(
                next_key(before, sequence.token_ids[len(keys) * size : (len(keys) + 1) * size])
            )
        return keys


def _last_to_keep(running: list[Sequence]) -> Sequence:
    """The newest that is not interactive, else the newest."""
    return next((s for s in reversed(running) if not s.request.interactive), running[-1])
