"""The native kernel against torch's operations, function by function, in both dtypes.

In all variants that this processor has: AVX2 and `generic`, say.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from kernel_variants import draw, relative_tolerance, turns_meanwhile
from other_processors import PROCESSORS, compiled
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from crma.core.errors import ConfigError
from crma.core.files import LOCK
from server.engine.native import kernel_build
from server.engine.native.kernel import Kernel

# Query heads, key-value heads and head size: no multiples of a vector's width.
H, HKV, E = 6, 2, 24
SCALING = 0.3
# Keys lie in whole vectors of any width, of some, of none; and a part, of 256 positions, begins
# inside a block of 24.
BLOCK_SIZES = [16, 24, 4]
Z = 4

Paged = tuple[Tensor, Tensor]  # a cache, and the blocks of a sequence there


def attention(query: Tensor, kv: Tensor, softcap: float | None = None) -> Tensor:
    """Attention of one row [H, e] over [positions, 2h, e] in fp32, by torch."""
    q = query[:, None].float()
    repeated = kv.float().repeat_interleave(len(query) // (kv.shape[1] // 2), dim=1)
    k, v = repeated.transpose(0, 1).chunk(2)
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, scale=SCALING)[:, 0]
    scores = torch.tanh(q @ k.mT * SCALING / softcap) * softcap
    return (scores.softmax(-1) @ v)[:, 0]


def assert_attends(
    kernel: Kernel,
    found: Tensor,
    query: Tensor,
    seen: Sequence[Tensor],
    softcap: float | None = None,
) -> None:
    """Rows [rows, H, e] attend to what each sees, [positions, 2h, e].

    Where bfloat16 is multiplied as it is, each weight is rounded to it, by up to 2**-9, and so is
    their sum.
    """
    exact = torch.stack([attention(q, kv, softcap) for q, kv in zip(query, seen, strict=True)])
    error = 1e-5 + exact.abs() * relative_tolerance(kernel, 1e-5)
    if kernel.dtype == torch.bfloat16 and kernel.cpu_class.multiplies_bfloat16:
        sizes = [torch.cat([k, v.abs()], dim=1) for k, v in (kv.chunk(2, dim=1) for kv in seen)]
        weighted = [attention(q, kv, softcap) for q, kv in zip(query, sizes, strict=True)]
        error += torch.stack(weighted) * 2**-8
    assert bool(((found.float() - exact).abs() <= error).all())


def test_norm_and_gate_round_as_torch_does(kernel: Kernel) -> None:
    x, weight = draw(kernel, 5, 50), draw(kernel, 50)
    tight = {"rtol": relative_tolerance(kernel, 2e-6), "atol": 1e-6}
    normed = rms_norm(x, (50,), None, 1e-5) * weight
    torch.testing.assert_close(kernel.norm(x, weight, 1e-5), normed, **tight)
    both_ends = x * 40  # of the sigmoid
    gate_up = torch.cat([both_ends, x], dim=-1)
    torch.testing.assert_close(kernel.gate(gate_up), silu(both_ends) * x, **tight)


def attended(
    kernel: Kernel,
    query: Tensor,
    paged: Paged,
    first: int,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a sequence's rows [s, H, e] from position `first` on."""
    cache, blocks = paged
    positions = torch.arange(first, first + len(query))[None]
    out = torch.empty_like(query)
    kernel.attend(query, cache, blocks[None], positions, out, SCALING, window, softcap)
    return out


def slots(blocks: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The places of a sequence's positions in the cache."""
    return blocks[positions // block_size] * block_size + positions % block_size


def sequence(
    kernel: Kernel, length: int, block_size: int = Z, shape: tuple[int, int] = (HKV, E)
) -> tuple[Tensor, Paged]:
    """Keys and values [length, 2h, e] of a sequence, and where they are.

    All else in the cache is NaN: reading it would show.

    Args:
        shape: h and e.
    """
    num_kv, head_size = shape
    num_blocks = -(-length // block_size)
    kv = draw(kernel, length, 2 * num_kv, head_size)
    cache = torch.full((num_blocks + 9, block_size, 2 * num_kv, head_size), torch.nan)
    cache = cache.to(kernel.dtype)
    shuffled = torch.randperm(num_blocks + 9, generator=torch.Generator().manual_seed(0))
    blocks = shuffled[:num_blocks].contiguous()
    kernel.store_kv(kv, cache, slots(blocks, torch.arange(length), block_size))
    return kv, (cache, blocks)


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 21), (251, 9), (600, 3), (240, 40)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_row_attends_to_its_own_positions_and_window(
    kernel: Kernel, block_size: int, first: int, rows: int, window: int | None
) -> None:
    kv, paged = sequence(kernel, first + rows, block_size)
    query = draw(kernel, rows, H, E)
    found = attended(kernel, query, paged, first, window)
    stops = range(first + 1, first + rows + 1)
    seen = [kv[max(0, stop - window) if window else 0 : stop] for stop in stops]
    assert_attends(kernel, found, query, seen)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_attention_of_a_row_has_the_same_bits_in_any_chunk(
    kernel: Kernel, block_size: int, window: int | None
) -> None:
    """Chunks of prompts of any size, single tokens, and a later token that is NaN."""
    _, paged = sequence(kernel, 290, block_size)
    query = draw(kernel, 290, H, E)
    whole = attended(kernel, query, paged, 0, window)
    for size in (1, 3, 8, 9, 64):
        for first in range(0, 290, size):
            chunk = query[first : first + size]
            found = attended(kernel, chunk, paged, first, window)
            assert torch.equal(found, whole[first : first + size])
    cache, blocks = paged
    last = slots(blocks, torch.tensor([289]), block_size)
    kernel.store_kv(torch.full((1, 2 * HKV, E), torch.nan, dtype=kernel.dtype), cache, last)
    found = attended(kernel, query, (cache, blocks), 0, window)
    assert torch.equal(found[:-1], whole[:-1])
    assert found[-1].isnan().all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("nan", [80, 81])
def test_a_position_before_the_window_is_not_read(
    kernel: Kernel, block_size: int, nan: int
) -> None:
    """Also if a lane of the processor takes it together with one that is in the window."""
    kv, (cache, blocks) = sequence(kernel, 160, block_size)
    place = slots(blocks, torch.tensor([nan]), block_size)
    kernel.store_kv(torch.full((1, 2 * HKV, E), torch.nan, dtype=kernel.dtype), cache, place)
    query = draw(kernel, 9, H, E)
    found = attended(kernel, query, (cache, blocks), 151, 152 - nan)
    assert found[0].isnan().all()
    seen = [kv[stop - 152 + nan : stop] for stop in range(153, 161)]
    assert_attends(kernel, found[1:], query[1:], seen)


def test_sequences_of_one_call_read_their_own_blocks(kernel: Kernel) -> None:
    lengths = [1, 4, 13, 30]
    cache = torch.full((40, Z, 2 * HKV, E), torch.nan, dtype=kernel.dtype)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: 4 * 8].view(4, 8)
    query = draw(kernel, 4, H, E)
    seen = []
    for row, length in enumerate(lengths):
        seen.append(draw(kernel, length, 2 * HKV, E))
        kernel.store_kv(seen[-1], cache, slots(blocks[row], torch.arange(length), Z))
    positions = torch.tensor(lengths)[:, None] - 1
    out = torch.empty(4, H, E, dtype=kernel.dtype)
    kernel.attend(query, cache, blocks, positions, out, SCALING, None)
    assert_attends(kernel, out, query, seen)
    alone = torch.empty(1, H, E, dtype=kernel.dtype)
    kernel.attend(query[2:3], cache, blocks[2:3], positions[2:3], alone, SCALING, None)
    assert torch.equal(alone[0], out[2])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_size_of_blocks_changes_no_bits(kernel: Kernel, block_size: int) -> None:
    query = draw(kernel, 40, H, E)
    found = [
        attended(kernel, query, sequence(kernel, 280, size)[1], 240, 70) for size in (1, block_size)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(("num_heads", "num_kv"), [(1, 1), (4, 4), (4, 2), (12, 3), (7, 1)])
@pytest.mark.parametrize("rows", [1, 5])
def test_any_number_of_queries_shares_a_key(
    kernel: Kernel, num_heads: int, num_kv: int, rows: int
) -> None:
    kv, paged = sequence(kernel, 150, 16, (num_kv, 64))
    query = draw(kernel, rows, num_heads, 64)
    found = attended(kernel, query, paged, 150 - rows, None)
    assert_attends(kernel, found, query, [kv[:stop] for stop in range(151 - rows, 151)])


@pytest.mark.parametrize("head_size", [1, 15, 33, 80])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("block_size", [16, 4])
def test_a_head_has_any_size(kernel: Kernel, block_size: int, rows: int, head_size: int) -> None:
    kv, paged = sequence(kernel, 291, block_size, (HKV, head_size))
    query = draw(kernel, rows, H, head_size)
    found = attended(kernel, query, paged, 291 - rows, None)
    assert_attends(kernel, found, query, [kv[:stop] for stop in range(292 - rows, 292)])


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_scores_are_bounded_softly(kernel: Kernel, softcap: float) -> None:
    kv, paged = sequence(kernel, 150)
    query = draw(kernel, 9, H, E)
    found = attended(kernel, query, paged, 141, None, softcap)
    assert_attends(kernel, found, query, [kv[:stop] for stop in range(142, 151)], softcap)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_rotation_stores_keys_as_they_are_turned_and_values_as_they_are(
    kernel: Kernel, block_size: int
) -> None:
    """What it leaves in the cache is what storing the same keys and values leaves there."""
    rows = 70
    heads = draw(kernel, rows, H + 2 * HKV, E)
    angles = draw(kernel, rows, 1, E)
    cache = torch.zeros(9 * (70 // block_size + 1), block_size, 2 * HKV, E, dtype=kernel.dtype)
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(0)) + block_size
    values = heads[:, H + HKV :].clone()
    kernel.rotate(heads, None, 0.0, (angles.cos(), angles.sin()), cache, places)
    assert torch.equal(heads[:, H + HKV :], values)
    stored = torch.zeros_like(cache)
    kernel.store_kv(heads[:, H:].contiguous(), stored, places)
    assert torch.equal(cache, stored)
    assert cache.any()


@pytest.mark.parametrize("rows", [1, 11])
def test_threads_that_share_a_long_row_change_no_bits(kernel: Kernel, rows: int) -> None:
    _, paged = sequence(kernel, 2000)
    query = draw(kernel, rows, H, E)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(attended(kernel, query, paged, 2000 - rows, None))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_threads_of_the_interpreter_run_while_a_long_context_is_read(
    kernel: Kernel,
) -> None:
    _, paged = sequence(kernel, 4000)
    query = draw(kernel, 200, H, E)
    assert turns_meanwhile(lambda: attended(kernel, query, paged, 3800, None)) > 0


@pytest.mark.e2e
@pytest.mark.parametrize("processor", PROCESSORS)
def test_attention_and_adapters_are_right_on_other_processors(
    processor: str, tmp_path: Path
) -> None:
    subprocess.run(compiled(processor, "rows.cpp", tmp_path), check=True)


def test_a_nan_stays_in_its_row(kernel: Kernel) -> None:
    x = draw(kernel, 3, 32)
    x[1, 7] = torch.nan
    normed = kernel.norm(x, torch.ones(32, dtype=kernel.dtype), 1e-5)
    assert normed.isnan().any(-1).tolist() == [False, True, False]
    assert kernel.gate(x).isnan().sum(-1).tolist() == [0, 1, 0]


def test_an_error_says_why_the_kernel_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text("no C++")
    monkeypatch.setattr(kernel_build, "SOURCE", source)
    with pytest.raises(ConfigError, match=r"does not build the kernel|no C\+\+ compiler"):
        Kernel(torch.float32, tmp_path / "kernels")
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [LOCK]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be built"):
        Kernel(torch.float32, tmp_path / "file")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        Kernel(torch.float32, tmp_path / "other")
