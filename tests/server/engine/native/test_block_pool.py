"""server.engine.native.block_pool: users of blocks, and the keys under which blocks are found."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.native.block_pool import (
    NULL_BLOCK,
    BlockPool,
    Key,
    next_key,
    root_key,
    salted_key,
)

KEYS = [bytes([i]) for i in range(6)]


class Blocks(RuleBasedStateMachine):
    """Sequences allocate, share, fill and release blocks in any order.

    `tables` has the blocks of each sequence, `content` the key of each block that can be found.
    """

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.tables: list[list[int]] = []
        self.content: dict[int, Key] = {}

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        num_free = self.pool.num_free
        blocks = self.pool.allocate(count)
        if count > num_free:
            assert blocks is None
            return
        assert blocks is not None
        assert len(blocks) == count
        assert NULL_BLOCK not in blocks
        for table in self.tables:
            assert not set(blocks) & set(table)
        for block in blocks:
            self.content.pop(block, None)
        self.tables.append(blocks)

    @rule(data=st.data(), key=st.sampled_from(KEYS))
    @precondition(lambda self: any(self.tables))
    def remember(self, data: st.DataObject, key: Key) -> None:
        used = [block for table in self.tables for block in table]
        block = data.draw(st.sampled_from(used))
        self.pool.remember(block, key)
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def share_found_blocks(self, keys: list[Key]) -> None:
        found = self.pool.find(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        if len(found) < len(keys):
            assert keys[len(found)] not in self.content.values()
        self.pool.share(found)
        self.tables.append(found)

    @rule(data=st.data())
    @precondition(lambda self: self.tables)
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @invariant()
    def accounts_balance(self) -> None:
        self.pool.check_integrity(self.tables)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    derandomize=True, max_examples=60, stateful_step_count=30, deadline=None
)


def test_known_content_is_kept_longest_and_the_end_of_a_sequence_goes_first() -> None:
    pool = BlockPool(7, 4)
    first = pool.allocate(3) or []
    second = pool.allocate(2) or []
    for block, key in zip([*first, *second], KEYS, strict=False):
        pool.remember(block, key)
    unknown = pool.allocate(1) or []
    for blocks in (first, second, unknown):
        pool.release(blocks)
    assert pool.allocate(6) == [*unknown, *reversed(first), *reversed(second)]
    assert pool.find(KEYS) == [], "an allocated block is not found by its old content"


def test_a_key_depends_on_the_identity_the_salt_and_on_every_token_and_its_place() -> None:
    selections = [(None, None), ("t", None), (None, "t"), ("t", "c")]
    roots = [root_key("base", "fp32", *selection) for selection in selections]
    roots.append(root_key("base", "bf16", None, None))
    roots.append(root_key("base", "fp32", "null", None))
    # Not only ASCII, and lone surrogates too: a salt is any text.
    roots += [salted_key(root, salt) for root in roots[:2] for salt in ("", "a", "é", "\ud800")]
    blocks = ([1, 2], [2, 1], [1, 2, 0], [258], [])
    keys = [next_key(root, token_ids) for root in roots for token_ids in blocks]
    keys.append(next_key(next_key(roots[0], [1]), [2]))
    keys.append(next_key(next_key(roots[0], []), [1, 2]))
    assert len({*keys, *roots}) == len(keys) + len(roots)
