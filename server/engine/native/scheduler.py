"""The scheduler: two queues, and the choice of what the next step computes. Plain data, no torch.

All sequences share one budget of tokens a step. Each sequence in decode takes one token; prompts
get the rest in chunks, so there are no separate phases. Owners take turns, then the adapters of an
owner; of prompts alike the one that is due first is next (turns.py). One that waits for an adapter
may be overtaken a limited number of times. Interactive requests run first and may preempt the
others; an owner that runs more than another gives way to it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from crma.models.rope import RopeScaling
from server.engine.native.block_pool import BlockPool
from server.engine.native.block_tables import BlockTables, RootOf
from server.engine.native.sequence import Sequence
from server.engine.native.step import Chunk, Step
from server.engine.native.step_planner import Admit, StepPlanner
from server.engine.native.turns import Turns
from server.engine.native.waiting import Waiting

# Logits of prompts in a step. With those of a vocabulary of 150,000 tokens they take 78 MB in fp32,
# and as much again for their log-probabilities.
MAX_PROMPT_LOGITS = 128


@dataclass(eq=False)
class Scheduler:
    """The sequences that wait and those that run.

    Args:
        blocks: the blocks of the KV cache.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: the budget of tokens of one step; at least max_num_seqs, so that it
            has a token for each sequence in decode.
        root_of: the key from which the chains of a selection's blocks start; None turns the prefix
            cache off.
        rope: how keys depend on a sequence's length; None: they do not.

    Attributes:
        waiting: the queue.
        running: oldest first.
    """

    blocks: BlockPool
    max_num_seqs: int
    max_num_batched_tokens: int
    root_of: RootOf | None = None
    rope: RopeScaling | None = None
    waiting: Waiting = field(default_factory=Waiting, init=False)
    running: list[Sequence] = field(default_factory=list, init=False)
    _tables: BlockTables = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.max_num_seqs <= self.max_num_batched_tokens
        self._tables = BlockTables(self.blocks, self.root_of, self.rope)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        queue = self.waiting.queue_of(sequence)
        queue.ledger.enter(sequence)
        queue.add(sequence)

    def schedule(self, admit: Admit, max_prompt_tokens: int | None = None) -> Step:
        """Choose what the next step computes, and allocate the blocks for it.

        Sequences in decode come first, then prompts; those that are not interactive come after all
        that are.

        Args:
            admit: asked for each waiting sequence that there is room for, in order; `NOW` takes its
                adapters into use.
            max_prompt_tokens: the most tokens of prompts, at least 1; None: what decode leaves.
        """
        decodes = [s for s in self.running if not s.is_prefilling]
        prefills = [s for s in self.running if s.is_prefilling]
        interactive_prefills = [s for s in prefills if s.request.interactive]
        other_prefills = [s for s in prefills if not s.request.interactive]
        planner = StepPlanner(
            self.waiting,
            self.running,
            self._tables,
            self.max_num_seqs,
            tokens_left=self.max_num_batched_tokens,
            prompt_logits_left=MAX_PROMPT_LOGITS,
            admit=admit,
        )
        planner.continue_running(decodes)
        if max_prompt_tokens is not None:
            planner.tokens_left = min(planner.tokens_left, max_prompt_tokens)
        planner.plan_prompts(Turns(interactive_prefills, self.waiting.interactive))
        planner.plan_prompts(Turns(other_prefills, self.waiting.background))
        return planner.step()

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """Record that chunks have run: their tokens are cached, and full blocks can be shared."""
        for chunk in chunks:
            self._tables.mark_computed(chunk.sequence, chunk.stop)

    def grown(self, sequence: Sequence) -> None:
        """Record that a running sequence has a new token; it may have to be computed anew."""
        if self.rope is not None and self.rope.is_outgrown(len(sequence.token_ids)):
            self._tables.forget(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Take a finished sequence out of its queue and free its blocks.

        Returns:
            Whether it was running.
        """
        is_running = sequence in self.running
        queue = self.waiting.queue_of(sequence)
        if is_running:
            self.running.remove(sequence)
        else:
            queue.remove(sequence)
        queue.ledger.leave(sequence)
        self._tables.free(sequence)
        return is_running

    def unfinished(self) -> list[Sequence]:
        """Return all sequences: first the running ones, then the waiting ones."""
        return [*self.running, *self.waiting]

    def check_integrity(self) -> None:
        """Check that blocks and sequences agree.

        Raises:
            AssertionError: a waiting sequence has blocks, a running one lacks some, or the pool's
                own accounts do not balance.
        """
        self.blocks.check_integrity([s.block_table for s in self.running])
        assert len(self.running) <= self.max_num_seqs
        assert not set(self.running) & set(self.waiting)
        assert not any(s.block_table or s.num_computed_tokens for s in self.waiting)
        for sequence in self.running:
            assert 0 <= sequence.num_computed_tokens < len(sequence.token_ids)
            num_blocks = self.blocks.blocks_for(sequence.num_computed_tokens)
            assert len(sequence.block_table) >= num_blocks
