"""The native kernel against torch's operations, function by function, in both dtypes."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from crma.core.errors import ConfigError
from server.engine.native import kernel_build
from server.engine.native.kernel import Kernel

# Query heads, key-value heads, head size and block size: no multiples of a vector's width.
H, HKV, E, Z = 6, 2, 24, 4
SCALING = 0.3


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    return Kernel(request.param, library.parent)


def draw(kernel: Kernel, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(kernel.dtype)


def relative_tolerance(kernel: Kernel, fp32: float) -> float:
    return fp32 if kernel.dtype == torch.float32 else 2**-7


def attention(query: Tensor, kv: Tensor) -> Tensor:
    """Attention of one row [H, e] over [positions, 2h, e] in fp32, by torch."""
    repeated = kv.float().repeat_interleave(H // HKV, dim=1)
    k, v = repeated.transpose(0, 1).chunk(2)
    return scaled_dot_product_attention(query[:, None].float(), k, v, scale=SCALING)[:, 0]


def test_norm_and_gate_round_as_torch_does(kernel: Kernel) -> None:
    x, weight = draw(kernel, 5, 50), draw(kernel, 50)
    tight = {"rtol": relative_tolerance(kernel, 2e-6), "atol": 1e-6}
    normed = rms_norm(x, (50,), None, 1e-5) * weight
    torch.testing.assert_close(kernel.norm(x, weight, 1e-5), normed, **tight)
    both_ends = x * 40  # of the sigmoid
    gate_up = torch.cat([both_ends, x], dim=-1)
    torch.testing.assert_close(kernel.gate(gate_up), silu(both_ends) * x, **tight)


@pytest.mark.parametrize("window", [None, 5])
def test_a_row_attends_to_its_own_blocks_and_window(kernel: Kernel, window: int | None) -> None:
    lengths = [1, 4, 13, 30]
    # Every position behind a row's own is NaN: reading it would show.
    cache = torch.full((40, Z, 2 * HKV, E), torch.nan, dtype=kernel.dtype)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: 4 * 8].view(4, 8)
    query = draw(kernel, 4, H, E)
    expected = torch.empty(4, H, E)
    for row, length in enumerate(lengths):
        kv = draw(kernel, length, 2 * HKV, E)
        for p in range(length):
            cache[blocks[row, p // Z], p % Z] = kv[p]
        expected[row] = attention(query[row], kv[-(window or length) :])
    positions = torch.tensor(lengths)[:, None] - 1
    out = torch.empty(4, H, E, dtype=kernel.dtype)
    kernel.attend(query, cache, blocks, positions, out, SCALING, window)
    rtol = relative_tolerance(kernel, 1e-5)
    torch.testing.assert_close(out.float(), expected, rtol=rtol, atol=1e-5)
    alone = torch.empty(1, H, E, dtype=kernel.dtype)
    kernel.attend(query[2:3], cache, blocks[2:3], positions[2:3], alone, SCALING, window)
    assert torch.equal(alone[0], out[2])


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
    assert not list((tmp_path / "kernels").glob("*"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be built"):
        Kernel(torch.float32, tmp_path / "file")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        Kernel(torch.float32, tmp_path / "other")
