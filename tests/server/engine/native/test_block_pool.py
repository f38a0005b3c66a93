"""server.engine.native.block_pool: no block has two owners that do not share it, and what is found is what was remembered."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.native.block_pool import NULL_BLOCK, BlockPool, Key, next_key, root_key

KEYS = [bytes([i]) for i in range(6)]


class Blocks(RuleBasedStateMachine):
    """Sequences that take, share, fill and give back blocks in any order; beside them what each known block holds."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.tables: list[list[int]] = []
        self.content: dict[int, Key] = {}

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert NULL_BLOCK not in blocks
            assert not any(block in table for block in blocks for table in self.tables)
            for block in blocks:
                self.content.pop(block, None)
            self.tables.append(blocks)

    @rule(data=st.data(), key=st.sampled_from(KEYS))
    @precondition(lambda self: any(self.tables))
    def remember(self, data: st.DataObject, key: Key) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        self.pool.remember(block, key)
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def share_what_is_found(self, keys: list[Key]) -> None:
        found = self.pool.find(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        assert len(found) == len(keys) or keys[len(found)] not in self.content.values()
        self.pool.share(found)
        self.tables.append(found)

    @rule(data=st.data())
    @precondition(lambda self: self.tables)
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity(self.tables)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    derandomize=True, max_examples=60, stateful_step_count=30, deadline=None
)


def test_what_is_known_is_kept_longest_and_the_end_of_a_sequence_goes_before_its_beginning() -> (
    None
):
    pool = BlockPool(7, 4)
    first, second = pool.allocate(3) or [], pool.allocate(2) or []
    for block, key in zip([*first, *second], KEYS, strict=False):
        pool.remember(block, key)
    (unknown,) = pool.allocate(1) or []
    for blocks in (first, second, [unknown]):
        pool.release(blocks)
    assert pool.allocate(6) == [unknown, *reversed(first), *reversed(second)]
    assert pool.find(KEYS) == [], "what was given out anew is forgotten"


def test_a_key_depends_on_identity_every_token_and_its_place() -> None:
    roots = [
        root_key("base", "fp32", *s) for s in ((None, None), ("t", None), (None, "t"), ("t", "c"))
    ]
    roots += [root_key("base", "bf16", None, None), root_key("base", "fp32", "null", None)]
    keys = [next_key(root, ids) for root in roots for ids in ([1, 2], [2, 1], [1, 2, 0], [258], [])]
    keys += [next_key(next_key(roots[0], [1]), [2]), next_key(next_key(roots[0], []), [1, 2])]
    assert len({*keys, *roots}) == len(keys) + len(roots)
