"""server.engine.native.scheduler: which blocks later prompts can find, and when."""

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import BLOCK_SIZE, make, now, sequence

from server.engine.native.block_pool import next_key, root_key


@given(length=st.integers(1, 15), budget=st.integers(1, 5), first=st.integers(0, 3))
@settings(deadline=None)
def test_after_each_chunk_the_full_blocks_can_be_found_and_no_others(
    length: int, budget: int, first: int
) -> None:
    """A block that is found before its last token is computed would answer with another's keys."""
    scheduler = make(max_num_seqs=1, budget=budget)
    added = sequence(length, first=first)
    scheduler.add(added)
    keys = [root_key(*added.request.selection)]
    for start in range(0, length - BLOCK_SIZE + 1, BLOCK_SIZE):
        keys.append(next_key(keys[-1], added.token_ids[start : start + BLOCK_SIZE]))
    computed = 0
    while computed < length:
        step = scheduler.schedule(now)
        before = scheduler.blocks.find(keys[1:])
        assert before == added.block_table[: computed // BLOCK_SIZE]  # what is only planned is not
        (chunk,) = step.chunks
        scheduler.computed(step.chunks)
        computed = chunk.stop
        assert added.num_computed_tokens == computed
        assert scheduler.blocks.find(keys[1:]) == added.block_table[: computed // BLOCK_SIZE]


def test_a_step_that_fails_leaves_no_block_to_be_found() -> None:
    scheduler = make(max_num_seqs=2, budget=8)
    failed, same = sequence(6), sequence(6)
    scheduler.add(failed)
    scheduler.schedule(now)
    scheduler.remove(failed)  # as the engine does, instead of `computed`
    scheduler.add(same)
    (chunk,) = scheduler.schedule(now).chunks
    assert (chunk.start, chunk.stop) == (0, 6)
