"""The block tables of sequences: finds cached blocks, allocates new ones, frees them. No torch."""

from collections.abc import Callable
from dataclasses import dataclass

from crma.core.selection import AdapterSelection
from crma.models.rope import RopeScaling
from server.engine.native.block_pool import BlockPool, Key, next_key, salted_key, scaled_key
from server.engine.native.sequence import Sequence

RootOf = Callable[[AdapterSelection], Key]


@dataclass(frozen=True)
class BlockTables:
    """Moves blocks between the pool and the block tables of sequences.

    Args:
        pool: all blocks.
        root_of: the key from which the chains of a selection's blocks start; None turns the prefix
            cache off.
        rope: how keys depend on a sequence's length; None: they do not.
    """

    pool: BlockPool
    root_of: RootOf | None
    rope: RopeScaling | None = None

    def find_cached(self, sequence: Sequence) -> list[int]:
        """Return the blocks that already hold the beginning of a sequence, unchanged.

        They never cover a token whose logits are needed: the newest one, and those before the
        prompt tokens whose log-probabilities are asked for.
        """
        if self.root_of is None:
            return []
        num_tokens = len(sequence.token_ids) - 1
        if sequence.wants_prompt_logprobs:
            num_tokens = min(num_tokens, sequence.request.sampling.prompt_logprobs_from - 1)
        num_blocks = num_tokens // self.pool.block_size
        return self.pool.find(self._key(sequence, index) for index in range(num_blocks))

    def share(self, sequence: Sequence, cached: list[int]) -> None:
        """Give a sequence the blocks that `find_cached` found for it."""
        self.pool.share(cached)
        sequence.block_table = cached
        sequence.num_computed_tokens = len(cached) * self.pool.block_size

    def num_missing(self, sequence: Sequence) -> int:
        """How many blocks a sequence lacks for the tokens that it has."""
        return max(0, self.pool.blocks_for(len(sequence.token_ids)) - len(sequence.block_table))

    def allocate(self, sequence: Sequence, num_tokens: int) -> list[int] | None:
        """Append the blocks that the next `num_tokens` tokens of a sequence need.

        Returns:
            The new blocks; None, with nothing changed, if too few are free.
        """
        num_blocks = self.pool.blocks_for(sequence.num_computed_tokens + num_tokens)
        num_missing = max(0, num_blocks - len(sequence.block_table))
        blocks = self.pool.allocate(num_missing)
        if blocks is not None:
            sequence.block_table += blocks
        return blocks

    def free(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence; its tokens have to be computed again."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def forget(self, sequence: Sequence) -> None:
        """`free` for a sequence whose keys and values would be others now."""
        self.free(sequence)
        sequence.block_keys = []

    def mark_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Record that the first `num_tokens` tokens are in the cache; full blocks can be found."""
        first_new = sequence.num_computed_tokens // self.pool.block_size
        num_full = num_tokens // self.pool.block_size
        sequence.num_computed_tokens = num_tokens
        if self.root_of is None:
            return
        for index in range(first_new, num_full):
            self.pool.remember(sequence.block_table[index], self._key(sequence, index))

    def _key(self, sequence: Sequence, index: int) -> Key:
        """Return the key of block number `index` of a sequence, which has to be full."""
        keys = sequence.block_keys
        size = self.pool.block_size
        while len(keys) <= index:
            previous = keys[-1] if keys else self._root(sequence)
            start = len(keys) * size
            keys.append(next_key(previous, sequence.token_ids[start : start + size]))
        return keys[index]

    def _root(self, sequence: Sequence) -> Key:
        """The start of a sequence's chain: all that its keys and values depend on, but tokens.

        And the salt, which decides who may share them.
        """
        assert self.root_of is not None
        root = self.root_of(sequence.request.selection)
        if sequence.request.cache_salt:
            root = salted_key(root, sequence.request.cache_salt)
        if self.rope is None:
            return root
        # The first token's frequencies decide those of all others at the same positions.
        num_prompt_tokens = len(sequence.request.prompt_ids)
        length = self.rope.length_at(0, num_prompt_tokens, len(sequence.token_ids))
        return scaled_key(root, length)
