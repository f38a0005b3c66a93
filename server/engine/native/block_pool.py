"""Which KV cache block belongs to whom, and what the full ones hold. Plain data, no torch.

A full block is known by a key: a chain of sha256 from everything that decides its keys and values (base model, dtype,
adapters) over the tokens up to its end. Sequences with the same beginning share such blocks; a block that nobody uses
keeps its content until it is needed for another.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = bytes
NULL_BLOCK = 0  # given to nobody and always zero: shorter rows of a block table are padded with it


def root_key(*identity: str | None) -> Key:
    """The start of every chain of one identity (digests and dtype). It can't be reached by tokens: another prefix."""
    return hashlib.sha256(b"root" + json.dumps(identity).encode()).digest()


def next_key(previous: Key, token_ids: Sequence[int]) -> Key:
    """The key of the block that holds `token_ids` after the block with key `previous`."""
    return hashlib.sha256(b"block" + previous + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """Blocks 1 to num_blocks - 1, counted by use.

    Args:
        block_size: tokens a block.

    Attributes:
        capacity: blocks that one sequence could have.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.capacity = num_blocks - 1
        self.block_size = block_size
        self._uses = [0] * num_blocks
        self._free = OrderedDict.fromkeys(
            range(1, num_blocks)
        )  # in the order in which they are given out
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, whether or not their content is still known."""
        return len(self._free)

    def is_free(self, block: int) -> bool:
        """Whether nobody uses it."""
        return not self._uses[block]

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for one new user, their old content forgotten; None, and nothing changed, if there are not."""
        if count > len(self._free):
            return None
        blocks = [block for block, _ in zip(self._free, range(count), strict=False)]
        for block in blocks:
            del self._free[block]
            self._uses[block] = 1
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]
        return blocks

    def find(self, keys: Iterable[Key]) -> list[int]:
        """The blocks of the longest known beginning of a chain of keys. Nothing is taken."""
        blocks = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more user of each."""
        for block in blocks:
            self._free.pop(block, None)
            self._uses[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each. What nobody knows is given out first, then what was free longest; of one sequence its
        end before its beginning, which more prompts share."""
        for block in reversed(blocks):
            self._uses[block] -= 1
            assert self._uses[block] >= 0
            if self._uses[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._key_of)

    def remember(self, block: int, key: Key) -> None:
        """Block is full and computed. The first block of a key stays the one that is found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """AssertionError unless each block is free or used just as often as `tables` say, and keys are one to one."""
        uses = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a block twice in one sequence"
            for block in table:
                uses[block] += 1
        assert uses == self._uses
        assert uses[NULL_BLOCK] == 0
        assert set(self._free) == {block for block in range(1, self.num_blocks) if not uses[block]}
        assert {block: key for key, block in self._block_of.items()} == self._key_of
