"""`python -m bench.kernels`: the native kernel's products against torch's, in turn.

It prints a line of JSON for each number of rows: the milliseconds of all linears and the head of a
step of the default base model, whose shapes it takes and whose weights it does not need, and the
shares of the machine's limits. The limits come first: bytes read per second, and the rate of a
large product, the best of torch's and the kernel's. Prompts need the head for one row only, so it
is left out where there are many rows.

With `--profile` a line says instead where the time of a whole step goes, of so many sequences with
a token each (`step_profile.py`). That needs the base model, which `make serve` pulls. With
`--waiting 2000` it also says what a long queue costs a step: see its part `scheduling`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.limits import HEAD, LAYER, NUM_LAYERS, NUM_WEIGHTS, NUM_WITHOUT_HEAD, measure_limits
from bench.limits import seconds as seconds_of
from bench.step_profile import StepProfiler
from crma.core.cache import cache_home
from crma.method.injection import Injection
from crma.models.base_model import DEFAULT_MODEL, find_base
from crma.models.loading import load_model, load_tokenizer, resolve_dtype
from server.engine.native.kernel import Kernel
from server.engine.native.packed_weight import Int8Weight, PackedWeight

MAX_ROWS_WITH_HEAD = 64
Row = dict[str, Any]


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
    parser.add_argument("--profile", action="store_true", help="a whole step, at 1 and 16 rows")
    parser.add_argument("--rows", help="numbers of rows, with commas (1,4,16,64,512)")
    parser.add_argument("--kernel", help="the class of processors; left out: the best")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--int8", action="store_true", help="with --profile: weights of 8 bits")
    parser.add_argument("--context", type=int, default=128, help="with --profile: tokens before")
    parser.add_argument("--waiting", type=int, default=0, help="with --profile: of a queue")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    dtype = resolve_dtype(options.dtype, torch.device("cpu"))
    kernel = Kernel(dtype, cache_home() / "kernels", options.kernel)
    limits = measure_limits(kernel)
    write({"row": "limits", **limits}, kernel)
    default_rows = "1,16" if options.profile else "1,4,16,64,512"
    rows = [int(number) for number in (options.rows or default_rows).split(",")]
    if options.profile:
        found = steps(kernel, limits, rows, options)
    else:
        found = products(kernel, limits, rows, options.repetitions)
    for row in found:
        write(row, kernel)


def write(row: Mapping[str, Any], kernel: Kernel) -> None:
    """Print a line of JSON."""
    origin = {
        "kernel": kernel.cpu_class.name,
        "dtype": str(kernel.dtype).removeprefix("torch."),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
    }
    sys.stdout.write(json.dumps({**row, **origin}) + "\n")
    sys.stdout.flush()


def steps(
    kernel: Kernel,
    limits: Mapping[str, float],
    numbers_of_rows: list[int],
    options: argparse.Namespace,
) -> Iterator[Row]:
    """The parts of a step, for each number of rows."""
    base = find_base(DEFAULT_MODEL)
    profiler = StepProfiler(
        Injection(load_model(base, torch.device("cpu"), kernel.dtype)),
        load_tokenizer(base),
        kernel,
        limits,
        max_rows=max(numbers_of_rows),
        context=options.context,
        int8=options.int8,
    )
    for rows in numbers_of_rows:
        yield profiler.measure(rows, options.waiting, options.repetitions)


def products(
    kernel: Kernel, limits: Mapping[str, float], numbers_of_rows: list[int], repetitions: int
) -> Iterator[Row]:
    """The figures of each way to multiply, for each number of rows."""
    ways = make_ways(kernel)
    for rows in numbers_of_rows:
        for name, times in measure(ways, rows, kernel.dtype, repetitions).items():
            yield {"row": f"{rows} rows", "way": name, **figures(times, rows, ways[name], limits)}


def make_ways(kernel: Kernel) -> dict[str, Way]:
    """torch's linear, the kernel's product and its product of 8 bits, on the same weights."""
    torch.manual_seed(0)
    shapes = [*LAYER * NUM_LAYERS, HEAD]
    plain = [torch.randn(shape).bfloat16().to(kernel.dtype) for shape in shapes]
    packed = [PackedWeight.of(weight) for weight in plain]
    int8 = [Int8Weight.of(weight) for weight in plain]
    return {
        "torch": Way(linear, plain, kernel.dtype.itemsize),
        "kernel": Way(kernel.product, packed, 2),
        "kernel int8": Way(kernel.product_int8, int8, 1),
    }


def measure(
    ways: Mapping[str, Way], rows: int, dtype: torch.dtype, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of a step, each way in its turn; the first turn does not count."""
    inputs = {width: torch.randn(rows, width).to(dtype) for _, width in (*LAYER, HEAD)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            taken = seconds_of(partial(step, way, inputs, rows))
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
    num_weights = NUM_WEIGHTS if rows <= MAX_ROWS_WITH_HEAD else NUM_WITHOUT_HEAD
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
