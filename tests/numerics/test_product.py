"""The kernel's product with weights in bfloat16, in every variant that can run here.

Variants that this processor has are the kernel's own libraries. Those with AVX-512, AVX512-BF16 and
AMX also run everywhere with their instructions emulated (cpp/emulated_instructions.h), which checks
their indexing and their padding, not the instructions. The one for Arm is built by a
cross-compiler and run by qemu.
"""

import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from server.engine.native.cpu_class import own_classes
from server.engine.native.kernel import Kernel
from server.engine.native.kernel_build import SOURCE
from server.engine.native.packed_weight import PackedWeight, is_exact_in_bfloat16

CPP = Path(__file__).parent / "cpp"
Product = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]

EMULATED = ["-march=x86-64-v3", "-include", str(CPP / "emulated_instructions.h")]
PROGRAMS = {  # how to compile cpp/product.cpp, and what runs it
    "avx512-bf16-emulated": (["g++", *EMULATED], []),
    "amx-emulated": (["g++", *EMULATED, "-DEMULATE_AMX"], []),
    "arm": (["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]),
}
E2E = {"arm"}
NATIVE = [each.name for each in own_classes()]
VARIANTS = [
    *NATIVE,
    *(pytest.param(each, marks=pytest.mark.e2e if each in E2E else ()) for each in PROGRAMS),
]

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


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Product:
    name = request.param
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    if name in NATIVE:
        return in_process(name, tmp_path_factory.mktemp("kernels"))
    compiler, runner = PROGRAMS[name]
    for tool in (compiler[0], *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    program = tmp_path_factory.mktemp("program") / name
    options = ["-std=c++20", "-O1", "-Wno-psabi", "-ffp-contract=fast", f"-I{SOURCE.parent}"]
    command = [*compiler, *options, str(CPP / "product.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    return by_program([*runner, str(program)])


def in_process(name: str, folder: Path) -> Product:
    @cache
    def kernel(dtype: torch.dtype) -> Kernel:
        return Kernel(dtype, folder, name)

    def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        return kernel(x.dtype).product(x, weight, bias)

    return product


def by_program(command: list[str]) -> Product:
    def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        num_biases = 0 if bias is None else len(bias)
        sizes = (*x.shape, weight.num_pairs, weight.out_features, num_biases)
        tensors = [x, weight.panels, *([] if bias is None else [bias])]
        problem = struct.pack("5q", *sizes) + b"".join(map(bytes_of, tensors))
        dtype = str(x.dtype).removeprefix("torch.")
        run = subprocess.run([*command, dtype], input=problem, capture_output=True, check=True)
        found = torch.frombuffer(bytearray(run.stdout), dtype=x.dtype)
        return found.view(len(x), weight.out_features)

    return product


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
    variant: Product, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, width, out = shape
    x = draw(rows, width).to(dtype)
    weight = draw(out, width, seed=1).bfloat16()
    bias = draw(out, seed=2).to(dtype)
    packed = PackedWeight.of(weight)
    assert is_close(variant(x, packed, None), x, weight, None)
    assert is_close(variant(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "out"), [(77, 40), (2600, 24)])
def test_a_rows_bits_depend_on_no_other_row_nor_on_their_number(
    variant: Product, width: int, out: int, dtype: torch.dtype
) -> None:
    x = draw(70, width).to(dtype)
    packed = PackedWeight.of(draw(out, width, seed=1))
    alone = torch.cat([variant(row[None], packed, None) for row in x])
    for rows in (*range(2, 20), 24, 33, 70):
        assert torch.equal(variant(x[:rows].contiguous(), packed, None), alone[:rows])
        assert torch.equal(variant(x[-rows:].contiguous(), packed, None), alone[-rows:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_changes_no_other(variant: Product, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(20, 33).to(dtype)
        packed = PackedWeight.of(draw(17, 33, seed=1))
        expected = variant(x, packed, None)
        x[7, 32] = value
        found = variant(x, packed, None)
        assert not found[7].isfinite().any()
        others = [row for row in range(20) if row != 7]
        assert torch.equal(found[others], expected[others])


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
