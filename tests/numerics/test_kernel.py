"""The native kernel against torch's operations, function by function, in both dtypes."""

from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from crma.core.errors import ConfigError
from server.engine.native import kernel_build
from server.engine.native.kernel import Int8Weight, Kernel

H, HKV, E, Z = 6, 2, 24, 4  # no multiple of a vector's width


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    return Kernel(request.param, library.parent)


def draw(kernel: Kernel, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(kernel.dtype)


def test_norm_and_gate_round_as_torch_does(kernel: Kernel) -> None:
    x, weight = draw(kernel, 5, 50), draw(kernel, 50)
    tight = {"rtol": 2e-6 if kernel.dtype == torch.float32 else 2**-7, "atol": 1e-6}
    torch.testing.assert_close(
        kernel.norm(x, weight, 1e-5), rms_norm(x, (50,), None, 1e-5) * weight, **tight
    )
    wide = torch.cat([x * 40, x], dim=-1)  # both ends of the sigmoid
    torch.testing.assert_close(kernel.gate(wide), silu(x * 40) * x, **tight)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_is_of_the_rows_own_blocks_and_window(kernel: Kernel, window: int | None) -> None:
    lengths = [1, 4, 13, 30]
    cache = torch.full((40, Z, 2 * HKV, E), torch.nan, dtype=kernel.dtype)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: 4 * 8].view(4, 8)
    query, out = draw(kernel, 4, H, E), torch.empty(4, H, E, dtype=kernel.dtype)
    expected = torch.empty(4, H, E)
    for row, length in enumerate(lengths):
        kv = draw(kernel, length, 2 * HKV, E)
        for p in range(length):
            cache[blocks[row, p // Z], p % Z] = kv[p]
        k, v = (
            kv[-(window or length) :]
            .float()
            .repeat_interleave(H // HKV, dim=1)
            .transpose(0, 1)
            .chunk(2)
        )
        expected[row] = scaled_dot_product_attention(query[row, :, None].float(), k, v, scale=0.3)[
            :, 0
        ]
    positions = torch.tensor(lengths)[:, None] - 1
    kernel.attend(
        query, cache, blocks, positions, out, 0.3, window
    )  # what is behind a row's end is NaN
    torch.testing.assert_close(
        out.float(), expected, rtol=1e-5 if kernel.dtype == torch.float32 else 2**-7, atol=1e-5
    )
    alone = torch.empty(1, H, E, dtype=kernel.dtype)
    kernel.attend(query[2:3], cache, blocks[2:3], positions[2:3], alone, 0.3, window)
    assert torch.equal(alone[0], out[2])


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_a_product_in_int8_is_that_of_the_rounded_row_and_weight(kernel: Kernel, rows: int) -> None:
    x, weight = draw(kernel, rows, 100), draw(kernel, 36, 100)
    steps = x.float().abs().amax(1, keepdim=True) / 127
    int8 = Int8Weight.of(weight)
    rounded = int8.values[:, :100].float() * int8.scales[:, None]
    assert (rounded - weight.float()).abs().amax() <= int8.scales.amax() / 2 * 1.0001
    found = kernel.product(x, int8)
    expected = (x.float() / steps).round() * steps @ rounded.T
    torch.testing.assert_close(
        found.float(), expected, rtol=2**-7 if kernel.dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )
    assert torch.equal(found[-1:], kernel.product(x[-1:], int8))
    x[0, 3] = torch.inf
    assert kernel.product(x, int8).isnan().all(-1).tolist() == [True] + [False] * (rows - 1)


def test_a_nan_stays_in_its_row(kernel: Kernel) -> None:
    x = draw(kernel, 3, 32)
    x[1, 7] = torch.nan
    assert kernel.norm(x, torch.ones(32, dtype=kernel.dtype), 1e-5).isnan().any(-1).tolist() == [
        False,
        True,
        False,
    ]
    assert kernel.gate(x).isnan().sum(-1).tolist() == [0, 1, 0]


def test_what_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
