"""The blocks of the KV cache: their owners, and the tokens that the full ones hold. No torch.

A full block has a key: the end of a sha256 chain that starts from everything its keys and values
depend on (base model, dtype, adapters), and from who may share it (a salt), and runs over all
tokens up to the end of the block. Sequences that begin with the same tokens under the same adapters
and salt share such blocks. A block without
users keeps its content until it is allocated again.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

Key = bytes
NULL_BLOCK = 0  # never allocated and always zero: it pads the shorter rows of a block table


def root_key(*identity: str | None) -> Key:
    """Return the start of every chain of one identity (digests and dtype).

    Its prefix differs from that of `next_key`, so no choice of tokens can produce it.
    """
    return hashlib.sha256(b"root" + json.dumps(identity).encode()).digest()


def salted_key(previous: Key, salt: str) -> Key:
    """Return the start of the chains that only requests with this salt share.

    Its prefix differs too.
    """
    return hashlib.sha256(b"salt" + previous + json.dumps(salt).encode()).digest()


def scaled_key(previous: Key, length: int) -> Key:
    """Return the start of the chains under the rotary frequencies of a length.

    Its prefix differs too.
    """
    return hashlib.sha256(b"rope" + previous + array("q", [length]).tobytes()).digest()


def next_key(previous: Key, token_ids: Sequence[int]) -> Key:
    """Return the key of the block that holds `token_ids` and follows the block `previous`."""
    return hashlib.sha256(b"block" + previous + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """Blocks 1 to num_blocks - 1, each with a count of its users.

    Args:
        num_blocks: blocks in the KV cache, the null block included.
        block_size: tokens in a block.

    Attributes:
        capacity: blocks that can be allocated, and so the most that one sequence can have.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.capacity = num_blocks - 1
        self.block_size = block_size
        self._num_users = [0] * num_blocks
        # In the order in which they will be allocated.
        self._free = OrderedDict.fromkeys(range(1, num_blocks))
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def num_free(self) -> int:
        """Blocks without users, whether or not their content is still known."""
        return len(self._free)

    def num_free_beside(self, blocks: Iterable[int]) -> int:
        """How many blocks have no users, not counting some."""
        return len(self._free) - sum(block in self._free for block in blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Give `count` free blocks to one user and forget their content.

        Returns:
            The blocks; None, with nothing changed, if fewer are free.
        """
        if count > len(self._free):
            return None
        blocks = list(islice(self._free, count))
        for block in blocks:
            del self._free[block]
            self._num_users[block] = 1
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
        return blocks

    def find(self, keys: Iterable[Key]) -> list[int]:
        """Return the blocks of the longest known beginning of a chain of keys, unchanged."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one user to each block."""
        for block in blocks:
            self._free.pop(block, None)
            self._num_users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one user from each block of a sequence.

        Blocks without a key are allocated again first, then the ones that have been free longest.
        The end of a sequence goes before its beginning, which more prompts share.
        """
        for block in reversed(blocks):
            self._num_users[block] -= 1
            assert self._num_users[block] >= 0
            if self._num_users[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._key_of)

    def remember(self, block: int, key: Key) -> None:
        """Record that a full block with computed content can be found under `key`.

        If another block has the key already, `find` goes on returning that one.
        """
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check the counts of users, the free blocks and the keys.

        Args:
            tables: the block tables of all users.

        Raises:
            AssertionError: a count differs from the tables, or a key and a block do not match.
        """
        num_users = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a sequence has a block twice"
            for block in table:
                num_users[block] += 1
        assert num_users == self._num_users
        assert num_users[NULL_BLOCK] == 0
        unused = {block for block in range(1, self.num_blocks) if num_users[block] == 0}
        assert set(self._free) == unused
        assert {block: key for key, block in self._block_of.items()} == self._key_of
