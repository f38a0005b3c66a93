"""The kernel's products, of weights in bfloat16 and in 8 bits, in every variant that runs here.

Variants that this processor has are the kernel's own libraries; other_processors.py has the others.
"""

import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from other_processors import PROCESSORS, compiled
from torch import Tensor

from server.engine.native.cpu_class import own_classes
from server.engine.native.kernel import Kernel
from server.engine.native.packed_weight import (
    MAX_INT8,
    Int8Weight,
    PackedWeight,
    is_exact_in_bfloat16,
)

NATIVE = [each.name for each in own_classes()]
# The programs take half a minute to compile.
VARIANTS = [*NATIVE, *(pytest.param(each, marks=pytest.mark.e2e) for each in PROCESSORS)]

# Rows, inputs, outputs: fewer and more than a tile, a panel, a pair, a block of k and a chunk of
# rows; the last ones take several turns of the threads.
SHAPES = [
    (1, 1, 1),
    (2, 7, 5),
    (3, 64, 16),
    (5, 33, 17),
    (6, 96, 48),
    (16, 576, 40),
    (31, 600, 33),
    (70, 2600, 24),
    (7, 64, 1000),
]


class Variant(NamedTuple):
    """The products of one class of processors."""

    product: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
    product_int8: Callable[[Tensor, Int8Weight], Tensor]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    name = request.param
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    if name in NATIVE:
        return in_process(name, library.parent)
    folder = tmp_path_factory.mktemp("program")
    return by_program(compiled(name, "product.cpp", folder))


def in_process(name: str, folder: Path) -> Variant:
    @cache
    def kernel(dtype: torch.dtype) -> Kernel:
        return Kernel(dtype, folder, name)

    return Variant(
        lambda x, weight, bias: kernel(x.dtype).product(x, weight, bias),
        lambda x, weight: kernel(x.dtype).product_int8(x, weight),
    )


def by_program(command: list[str]) -> Variant:
    def run(mode: str, sizes: tuple[int, ...], tensors: Sequence[Tensor]) -> Tensor:
        problem = struct.pack(f"{len(sizes)}q", *sizes) + b"".join(map(bytes_of, tensors))
        done = subprocess.run([*command, mode], input=problem, capture_output=True, check=True)
        dtype = tensors[0].dtype
        return torch.frombuffer(bytearray(done.stdout), dtype=dtype).view(sizes[0], sizes[3])

    def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        biases = [] if bias is None else [bias]
        sizes = (*x.shape, weight.num_words, weight.out_features, sum(map(len, biases)))
        return run(str(x.dtype).removeprefix("torch."), sizes, [x, weight.panels, *biases])

    def product_int8(x: Tensor, weight: Int8Weight) -> Tensor:
        sizes = (*x.shape, weight.num_words, weight.out_features)
        return run("int8", sizes, [x, weight.panels, weight.scales, weight.sums])

    return Variant(product, product_int8)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def is_close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Within rounding of the float64 product: of each sum, and of a result in bfloat16."""
    exact = x.double() @ weight.double().mT
    size = x.double().abs() @ weight.double().abs().mT
    if bias is not None:
        exact += bias.double()
        size += bias.double().abs()
    error = (found.double() - exact).abs()
    rounding = 0.0 if found.dtype == torch.float32 else 2**-8
    return bool((error <= size * x.shape[1] ** 0.5 * 2**-23 + exact.abs() * rounding).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_in_float64(
    variant: Variant, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, width, out = shape
    x = draw(rows, width).to(dtype)
    weight = draw(out, width, seed=1).bfloat16()
    bias = draw(out, seed=2).to(dtype)
    packed = PackedWeight.of(weight)
    assert is_close(variant.product(x, packed, None), x, weight, None)
    assert is_close(variant.product(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "out"), [(77, 40), (2600, 24)])
def test_a_rows_bits_depend_on_no_other_row_nor_on_their_number(
    variant: Variant, width: int, out: int, dtype: torch.dtype
) -> None:
    x = draw(70, width).to(dtype)
    packed = PackedWeight.of(draw(out, width, seed=1))
    alone = torch.cat([variant.product(row[None], packed, None) for row in x])
    for rows in (*range(2, 20), 24, 33, 70):
        assert torch.equal(variant.product(x[:rows].contiguous(), packed, None), alone[:rows])
        assert torch.equal(variant.product(x[-rows:].contiguous(), packed, None), alone[-rows:])


@pytest.mark.parametrize("name", NATIVE)
def test_a_product_of_no_rows_is_empty(name: str) -> None:
    """The head gets no row in a step that ends no prompt."""
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    weight = draw(40, 33)
    native = in_process(name, library.parent)
    for dtype in (torch.float32, torch.bfloat16):
        nothing = torch.empty(0, 33, dtype=dtype)
        assert native.product(nothing, PackedWeight.of(weight), None).shape == (0, 40)
        assert native.product_int8(nothing, Int8Weight.of(weight)).shape == (0, 40)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_changes_no_other(variant: Variant, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(20, 33).to(dtype)
        packed = PackedWeight.of(draw(17, 33, seed=1))
        expected = variant.product(x, packed, None)
        x[7, 32] = value
        found = variant.product(x, packed, None)
        assert not found[7].isfinite().any()
        others = [row for row in range(20) if row != 7]
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_8_bits_it_is_the_product_of_the_rounded_row_and_weight(
    variant: Variant, shape: tuple[int, int, int]
) -> None:
    """Also where all numbers are the largest: sums of 16 bits would saturate."""
    rows, width, out = shape
    x = draw(rows, width)
    weight = draw(out, width, seed=1)
    x[0] = 3.0
    weight[0] = 2.0
    int8 = Int8Weight.of(weight)
    scales = x.abs().amax(1, keepdim=True) / MAX_INT8
    # As the kernel computes it: a tie rounds to the same side.
    rounded_x = (x * (1 / scales)).round().double()
    sums = rounded_x @ int8.values().double().mT
    found = variant.product_int8(x, int8)
    expected = sums * scales.double() * int8.scales.double()
    slack = scales * int8.scales * MAX_INT8  # one number of x rounded to the other side
    assert bool(((found - expected).abs() <= expected.abs() * 1e-6 + slack).all())
    assert found[0, 0] == pytest.approx(6.0 * width, rel=1e-6)


@pytest.mark.parametrize("rows", [*range(1, 14), 16, 17, 100, 512])
def test_in_8_bits_sums_are_exact(variant: Variant, rows: int) -> None:
    """Of whole numbers up to 127 on both sides, whose scales are 1: also where all are extreme."""
    generator = torch.Generator().manual_seed(rows)
    for width, out, smallest in ((1, 16, 127), (35, 40, 127), (601, 33, 127), (1037, 17, 0)):
        x, weight = (
            torch.randint(smallest, MAX_INT8 + 1, (n, width), generator=generator)
            * (2 * torch.randint(2, (n, width), generator=generator) - 1)
            for n in (rows, out)
        )
        for numbers in (x, weight):
            numbers[:, 0] = MAX_INT8
            numbers[-1] = -MAX_INT8
        found = variant.product_int8(x.float(), Int8Weight.of(weight.float()))
        assert torch.equal(found.long(), x @ weight.mT)


def test_a_product_in_8_bits_leaves_nothing_in_the_registers_that_numpy_divides_with(
    variant: Variant,
) -> None:
    """GCC's MMX instructions had: NumPy gave NaN, and scipy's binomial test failed."""
    for rows, width, out in SHAPES:
        variant.product_int8(draw(rows, width), Int8Weight.of(draw(out, width, seed=1)))
    assert np.float64(5.0) // np.float64(2.0) == 2.0


def test_in_8_bits_a_rows_bits_depend_on_no_other_row(variant: Variant) -> None:
    x = draw(70, 2600)
    int8 = Int8Weight.of(draw(40, 2600, seed=1))
    alone = torch.cat([variant.product_int8(row[None], int8) for row in x])
    for rows in (*range(2, 20), 24, 33, 70):
        assert torch.equal(variant.product_int8(x[-rows:].contiguous(), int8), alone[-rows:])


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_in_8_bits_a_row_that_is_not_finite_is_nan_alone(variant: Variant, rows: int) -> None:
    x = draw(rows, 100)
    x[0, 3] = torch.inf
    found = variant.product_int8(x, Int8Weight.of(draw(36, 100)))
    assert found.isnan().all(-1).tolist() == [True] + [False] * (rows - 1)


def test_a_weight_in_8_bits_is_within_half_a_step() -> None:
    weight = draw(36, 100)
    int8 = Int8Weight.of(weight)
    error = (int8.values() * int8.scales[:, None] - weight).abs()
    assert bool((error <= int8.scales[:, None] / 2 * 1.0001).all())


@pytest.fixture
def kernel() -> Kernel:
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    return Kernel(torch.float32, library.parent)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_threads_change_no_bits(kernel: Kernel, rows: int) -> None:
    x = draw(rows, 300)
    packed = PackedWeight.of(draw(2000, 300, seed=1))
    together = kernel.product(x, packed)
    torch.set_num_threads(1)
    assert torch.equal(kernel.product(x, packed), together)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("out", [1, 33, 100])
@pytest.mark.parametrize("rows", [1, 300, 3000])
def test_more_threads_than_turns_change_no_bits(kernel: Kernel, rows: int, out: int) -> None:
    x = draw(rows, 96)
    packed = PackedWeight.of(draw(out, 96, seed=1))
    int8 = Int8Weight.of(draw(out, 96, seed=2))
    found = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        found.append(torch.stack([kernel.product(x, packed), kernel.product_int8(x, int8)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_threads_of_the_interpreter_run_meanwhile(kernel: Kernel) -> None:
    x = draw(512, 1024)
    packed = PackedWeight.of(draw(4096, 1024, seed=1))
    thread = threading.Thread(target=kernel.product, args=(x, packed))
    turns = 0
    thread.start()
    while thread.is_alive():
        turns += 1
    assert turns > 1000


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (40, 90)])
def test_a_packed_weight_keeps_its_values(shape: tuple[int, int]) -> None:
    weight = draw(*shape).bfloat16()
    packed = PackedWeight.of(weight)
    assert torch.equal(packed.unpacked(), weight)
    ids = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(packed.rows(ids), weight[ids])


def test_a_weight_is_exact_in_bfloat16_or_not() -> None:
    weight = draw(1500, 3)
    assert not is_exact_in_bfloat16(weight)
    rounded = weight.bfloat16().float()
    assert is_exact_in_bfloat16(rounded)
    rounded[1400, 1] += 1e-6
    assert not is_exact_in_bfloat16(rounded)
