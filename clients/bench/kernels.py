"""`python -m bench.kernels`: the native kernel's products against torch's, in turn.

It prints a line of JSON for each number of rows: the milliseconds of all linears and the head of a
step of the default base model, whose shapes it takes and whose weights it does not need, and the
shares of the machine's limits. The limits come first: bytes read per second, and the rate of a
large product, the better of torch's and the kernel's. Prompts need the head for one row only, so it
is left out where there are many rows.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from crma.core.cache import cache_home
from server.engine.native.kernel import Kernel
from server.engine.native.packed_weight import Int8Weight, PackedWeight

NUM_LAYERS = 30
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # qkv, out, gate and up, down: out, in
HEAD = (49152, 576)
MAX_ROWS_WITH_HEAD = 64

Run = Callable[[], object]


class Way(NamedTuple):
    """A way to multiply.

    Args:
        product: of rows and a weight that is laid out for it.
        weights: of every linear, and of the head, which is the last.
        weight_bytes: of one weight.
    """

    product: Callable[[Tensor, Any], Tensor]
    weights: list[Any]
    weight_bytes: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__)
    parser.add_argument("--rows", default="1,4,16,64,512", help="numbers of rows, with commas")
    parser.add_argument("--kernel", help="the class of processors; left out: the best")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    kernel = Kernel(dtype, cache_home() / "kernels", options.kernel)
    ways = make_ways(kernel, dtype)
    limits = measure_limits(kernel)
    write({"row": "limits", "class": kernel.cpu_class.name, **limits})
    for rows in map(int, options.rows.split(",")):
        for name, times in measure(ways, rows, dtype, options.repetitions).items():
            write({"row": f"{rows} rows", "way": name, **figures(times, rows, ways[name], limits)})


def write(row: Mapping[str, Any]) -> None:
    """Print a line of JSON."""
    load = {"load_average": os.getloadavg()[0], "threads": torch.get_num_threads()}
    sys.stdout.write(json.dumps({**row, **load}) + "\n")
    sys.stdout.flush()


def make_ways(kernel: Kernel, dtype: torch.dtype) -> dict[str, Way]:
    """torch's linear, the kernel's product and its product of 8 bits, on the same weights."""
    torch.manual_seed(0)
    shapes = [*LAYER * NUM_LAYERS, HEAD]
    plain = [torch.randn(shape).bfloat16().to(dtype) for shape in shapes]
    packed = [PackedWeight.of(weight) for weight in plain]
    int8 = [Int8Weight.of(weight) for weight in plain]
    return {
        "torch": Way(linear, plain, dtype.itemsize),
        "kernel": Way(kernel.product, packed, 2),
        "kernel int8": Way(kernel.product_int8, int8, 1),
    }


def measure_limits(kernel: Kernel) -> dict[str, float]:
    """GB/s read, as `peers.py` measures it, and GFLOP/s of large products."""
    memory = torch.ones(1 << 26)
    x = torch.randn(2048, 2048).to(kernel.dtype)
    weight = torch.randn(2048, 2048).to(kernel.dtype)
    packed = PackedWeight.of(weight)
    operations = 2 * 2048**3
    by_torch = operations / best_time(lambda: linear(x, weight), 5)
    by_kernel = operations / best_time(lambda: kernel.product(x, packed), 5)
    return {
        "read_gb_s": 4e-9 * len(memory) / best_time(memory.sum, 20),
        "gemm_gf_s": max(by_torch, by_kernel) / 1e9,
        "torch_gemm_gf_s": by_torch / 1e9,
        "kernel_gemm_gf_s": by_kernel / 1e9,
    }


def best_time(run: Run, repetitions: int) -> float:
    """The fewest seconds that a run took."""
    return min(seconds(run) for _ in range(repetitions))


def seconds(run: Run) -> float:
    """How long a run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    ways: Mapping[str, Way], rows: int, dtype: torch.dtype, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of a step, each way in its turn; the first turn does not count."""
    inputs = {width: torch.randn(rows, width).to(dtype) for _, width in (*LAYER, HEAD)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            taken = seconds(partial(step, way, inputs, rows))
            if repetition:
                times[name].append(taken)
    return times


def step(way: Way, inputs: Mapping[int, Tensor], rows: int) -> None:
    """All products of a step."""
    widths = [width for _, width in LAYER] * NUM_LAYERS
    for width, weight in zip(widths, way.weights, strict=False):
        way.product(inputs[width], weight)
    if rows <= MAX_ROWS_WITH_HEAD:
        way.product(inputs[HEAD[1]], way.weights[-1])


def figures(
    times: list[float], rows: int, way: Way, limits: Mapping[str, float]
) -> dict[str, float]:
    """Milliseconds, and the shares of the limits on reading and on computing."""
    num_weights = NUM_LAYERS * sum(out * width for out, width in LAYER)
    if rows <= MAX_ROWS_WITH_HEAD:
        num_weights += HEAD[0] * HEAD[1]
    middle = median(times)
    reading = num_weights * way.weight_bytes / limits["read_gb_s"] / 1e9
    computing = 2 * num_weights * rows / limits["gemm_gf_s"] / 1e9
    return {
        "ms": 1e3 * middle,
        "min_ms": 1e3 * min(times),
        "share_of_reading": reading / middle,
        "share_of_computing": computing / middle,
        "share_of_limit": max(reading, computing) / middle,
    }


if __name__ == "__main__":
    main()
