"""`python -m bench.limits`: how fast this machine reads and multiplies, as a line of JSON.

Tokens a second follow for the default base model, whose shapes are here; its weights are not
needed.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from crma.core.cache import cache_home
from crma.core.errors import ConfigError
from crma.models.loading import resolve_dtype
from server.engine.native.huge_pages import HugePages
from server.engine.native.kernel import Kernel
from server.engine.native.packed_weight import PackedWeight

NUM_LAYERS = 30
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # qkv, out, gate and up, down: out, in
HEAD = (49152, 576)
NUM_WITHOUT_HEAD = NUM_LAYERS * sum(out * width for out, width in LAYER)
NUM_OF_HEAD = HEAD[0] * HEAD[1]
NUM_WEIGHTS = NUM_WITHOUT_HEAD + NUM_OF_HEAD

SIZE = 2048  # of a large product, in all three directions
MAX_TRIES = 50
MAX_SECONDS = 2.0  # of all tries together
MIN_TRIES = 3

Run = Callable[[], object]


def own_kernel() -> Kernel | None:
    """The native kernel that a server chooses by itself on this machine; None: it has none."""
    dtype = resolve_dtype("auto", torch.device("cpu"))
    try:
        return Kernel(dtype, cache_home() / "kernels")
    except ConfigError:
        return None


def measure_limits(kernel: Kernel | None) -> dict[str, float]:
    """Measure with all threads, each figure at the best of some tries.

    Returns:
        read_gb_s: GB/s read, from as many bytes as the weights have.
        gemm_fp32_gf_s, gemm_bf16_gf_s: GFLOP/s of torch's product with 2048 rows, in each type.
        gemm_kernel_gf_s: of the kernel's, where there is one.
        gemm_gf_s: the best of these.
        read_tok_s: tokens/s of one sequence, if each token reads all weights, in bfloat16, once.
        gemm_tok_s: tokens/s of all sequences, if each token takes two operations a weight at the
            rate of the large product.
        prefill_tok_s: the same without the head, which a prompt needs only once.
    """
    # float32, where the weights are bfloat16; in memory that is like theirs
    as_many_bytes = HugePages().empty((NUM_WEIGHTS // 2,), torch.float32).fill_(1)
    read_s = best_time(as_many_bytes.sum)
    rates = {
        "gemm_fp32_gf_s": gemm_rate(torch.float32) / 1e9,
        "gemm_bf16_gf_s": gemm_rate(torch.bfloat16) / 1e9,
    }
    if kernel is not None:
        rates["gemm_kernel_gf_s"] = kernel_rate(kernel) / 1e9
    best = max(rates.values())
    return {
        "read_gb_s": 2e-9 * NUM_WEIGHTS / read_s,
        **rates,
        "gemm_gf_s": best,
        "read_tok_s": 1 / read_s,
        "gemm_tok_s": best * 1e9 / 2 / NUM_WEIGHTS,
        "prefill_tok_s": best * 1e9 / 2 / NUM_WITHOUT_HEAD,
    }


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of torch's large product."""
    x = torch.ones(SIZE, SIZE, dtype=dtype)
    weight = torch.ones(SIZE, SIZE, dtype=dtype)
    return 2 * SIZE**3 / best_time(lambda: linear(x, weight))


def kernel_rate(kernel: Kernel) -> float:
    """Operations per second of the kernel's large product."""
    x = torch.ones(SIZE, SIZE, dtype=kernel.dtype)
    weight = PackedWeight.of(torch.ones(SIZE, SIZE))
    return 2 * SIZE**3 / best_time(lambda: kernel.product(x, weight))


def best_time(run: Run) -> float:
    """The fewest seconds that a run took, in at least three of them."""
    times: list[float] = []
    while len(times) < MIN_TRIES or (len(times) < MAX_TRIES and sum(times) < MAX_SECONDS):
        times.append(seconds(run))
    return min(times)


def seconds(run: Run) -> float:
    """How long a run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    with torch.inference_mode():
        limits = measure_limits(own_kernel())
    sys.stdout.write(json.dumps(limits) + "\n")


if __name__ == "__main__":
    main()
