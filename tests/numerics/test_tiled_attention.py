"""server.engine.native.tiled_attention: in tiles, attention gives what it gives in groups.

On a CPU, where a test asks for tiles: the layout and the mask are those of a GPU, the program that
torch compiles is not.
"""

from collections.abc import Iterator
from functools import cache

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import SELECTIONS, Call, World, mismatches, prompt, run
from torch import Tensor

from server.engine.native import model_runner, tiled_attention
from server.engine.native.batch import build_batch
from server.engine.native.kv_cache import attend
from server.engine.native.sequence import Sequence
from server.engine.native.step import Chunk, Step
from server.engine.native.tiled_attention import can_attend_in_tiles
from server.engine.native.tiles import PADDING, ROWS, make_tiles
from server.engine.request import Request, SamplingParams

NUM_BLOCKS = 24
TOLERANCE = 2e-5
BLOCK_SIZE = 16
HEAD_SIZE = 16


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of tiles runs as it is written, without a compiler."""
    from torch.nn.attention import flex_attention

    from server.engine.native.tile_program import attend as program

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(tiled_attention, "_program", lambda: program)


@pytest.fixture
def compiled() -> Iterator[None]:
    """The program is compiled once; a batch for which it had to be compiled again is an error."""
    torch.compiler.reset()
    tiled_attention._program.cache_clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()
    tiled_attention._program.cache_clear()


def chunk(blocks: list[int], start: int, count: int) -> Chunk:
    """Tokens of a sequence whose positions lie in these blocks."""
    sequence = Sequence(Request("r", prompt_ids=(5,) * (start + count)), 0)
    sequence.block_table = blocks
    return Chunk(sequence, start, count)


def random_step(spans: list[tuple[int, int]], seed: int, block_size: int) -> Step:
    """Chunks of sequences, from a start and of a length each, in blocks that are theirs.

    The first block is shared by all.
    """
    order = torch.randperm(NUM_BLOCKS - 2, generator=torch.Generator().manual_seed(seed)) + 2
    free = order.tolist()
    chunks = []
    for start, count in spans:
        num_own = -(-(start + count) // block_size) - 1
        own = [free.pop() for _ in range(min(num_own, len(free)))]
        room = (1 + len(own)) * block_size
        start = min(start, room - 1)
        chunks.append(chunk([1, *own], start, min(count, room - start)))
    return Step(chunks)


def new_cache(block_size: int, num_kv: int = 2, head_size: int = HEAD_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, NUM_BLOCKS, block_size, 2 * num_kv, head_size, generator=generator)


def check(
    cache: Tensor, step: Step, heads: int, window: int | None = None, softcap: float | None = None
) -> None:
    """Tiles and groups give the same."""
    num_tokens = sum(each.count for each in step.chunks)
    generator = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(num_tokens, heads, cache.shape[-1], generator=generator)
    by_group, by_tile = (
        attend(build_batch(step, cache, in_tiles=in_tiles).paged, 0, query, 0.3, window, softcap)
        for in_tiles in (False, True)
    )
    assert by_tile.is_contiguous()
    torch.testing.assert_close(by_tile, by_group, atol=TOLERANCE, rtol=0)


SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 15, 16, 17, 40])),
    min_size=1,
    max_size=5,
)


@pytest.mark.usefixtures("eager")
@settings(
    derandomize=True,
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it changes with no example
)
@given(
    spans=SPANS,
    block_size=st.sampled_from([4, 16]),
    heads=st.sampled_from([2, 4, 6]),
    window=st.sampled_from([None, 5]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_tiles_attend_as_groups_do(
    spans: list[tuple[int, int]],
    block_size: int,
    heads: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Single tokens and chunks, a shared block, fewer key-value heads, a window, a soft cap."""
    step = random_step(spans, len(spans), block_size)
    check(new_cache(block_size), step, heads, window, softcap)


@pytest.mark.usefixtures("eager")
def test_a_row_gets_the_same_beside_other_sequences() -> None:
    cache = new_cache(BLOCK_SIZE)
    chunks = random_step([(20, 1), (0, 30), (33, 1)], 1, BLOCK_SIZE).chunks
    query = torch.randn(32, 4, HEAD_SIZE)
    together = attend(build_batch(Step(chunks), cache, in_tiles=True).paged, 0, query, 0.3)
    alone = attend(build_batch(Step(chunks[:1]), cache, in_tiles=True).paged, 0, query[:1], 0.3)
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=0)


def test_a_tile_has_rows_of_one_sequence_and_reads_its_blocks_only() -> None:
    chunks = [chunk([3, 4], 20, 1), chunk([5, 6, 7], 10, 30)]
    tiles = make_tiles(chunks, new_cache(BLOCK_SIZE))
    assert tiles.sequences.tolist()[:3] == [0, 1, 1]
    assert tiles.num_blocks.flatten().tolist() == [2, 2, 3, 0, 0, 0, 0, 0]
    assert tiles.blocks[0, 0, 0, :2].tolist() == [3, 4]
    assert tiles.blocks[0, 0, 2, :3].tolist() == [5, 6, 7]
    assert tiles.rows.tolist()[:ROWS] == [0] * ROWS
    assert tiles.positions.tolist()[2 * ROWS : 3 * ROWS] == [*range(26, 40), 39, 39]
    assert tiles.rows[tiles.places].tolist() == list(range(31))
    assert tiles.ranks[1, 5:8].tolist() == [0, 1, 2]
    assert tiles.ranks[1, 3:5].tolist() == [-1, -1]


def test_all_that_varies_is_padded() -> None:
    """A size of 1 would be compiled for itself."""
    tiles = make_tiles([chunk([3], 0, 1)], new_cache(BLOCK_SIZE))
    sizes = (tiles.num_blocks.shape[2], tiles.ranks.shape[0], tiles.blocks.shape[2])
    assert sizes == (PADDING, PADDING, PADDING)
    assert len(tiles.rows) == PADDING * ROWS


def test_a_cpu_attends_in_groups() -> None:
    assert not can_attend_in_tiles(new_cache(BLOCK_SIZE), 4)


@cache
def world(family: str) -> World:
    return World(tiny.injection(family), tiny.adapters(tiny.injection(family)))


def zeroed(cache: Tensor, *_: int) -> bool:
    """Tiles attend. As it is written, the program also multiplies blocks that hold nothing yet."""
    cache.zero_()
    return True


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_every_request_in_tiles_gets_what_it_gets_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared prefixes, chunked prompts, preemption; through the decoder and through modules."""
    monkeypatch.setattr(model_runner, "can_attend_in_tiles", zeroed)
    greedy = SamplingParams(9, logprobs=2, prompt_logprobs=1)
    schedule = [
        Call(selection, prompt(5 + 4 * i, i % 2), greedy, arrival=i)
        for i, selection in enumerate(SELECTIONS[:8])
    ]
    limits = {"room": 72, "block_size": 4, "max_num_batched_tokens": 24, "native": False}
    answered, engine = run(world(family), schedule, **limits)
    assert engine.runner.in_tiles
    assert engine.counters.num_preemptions > 0
    for call, index, answer in answered:
        assert not mismatches(world(family), answer, call, index, 1e-4)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 2.0)])
def test_one_compiled_program_serves_any_batch(window: int | None, softcap: float | None) -> None:
    cache = new_cache(BLOCK_SIZE)
    for seed, spans in enumerate(
        [[(0, 1)], [(30, 1)] * 3, [(0, 40), (17, 1)], [(3, 17)] * 4 + [(40, 1)], [(9, 16)]]
    ):
        check(cache, random_step(spans, seed, BLOCK_SIZE), 6, window, softcap)
