"""The parts of the benchmark of a device that need torch, in a process of their own.

`python -m bench.device limits MODEL DEVICE` writes a JSON object: how fast the device reads and
multiplies, and what that means for the model, as `bench.workloads.speed_limit` takes it.

`python -m bench.device adapters MODEL FOLDER` writes the adapters of `bench.peers`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.peers import add_adapters, load_model
from crma.models.loading import resolve_dtype

READ_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far more than the caches hold
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
TRIES = 10


def measure_limits(model: str, device: torch.device) -> dict[str, Any]:
    """Measure the device in the dtype that serves, at the best of TRIES.

    Returns:
        read_gb_s: GB/s read.
        gemm_gf_s: GFLOP/s of a large product.
        read_tok_s: tokens/s of one sequence, if each token reads all weights once.
        gemm_tok_s: tokens/s of all sequences, if each token takes two operations a weight.
        prefill_tok_s: the same without the head, which a prompt needs only once.
        device: its name. dtype: which serves. weight_bytes: of all weights.
    """
    dtype = resolve_dtype("auto", device)
    num_weights, num_of_head = count_weights(model)
    read = read_rate(device)
    gemm = gemm_rate(device, dtype)
    is_gpu = device.type == "cuda"
    return {
        "read_gb_s": read / 1e9,
        "gemm_gf_s": gemm / 1e9,
        "read_tok_s": read / num_weights / 2,  # weights have 16 bits, whatever they are computed in
        "gemm_tok_s": gemm / 2 / num_weights,
        "prefill_tok_s": gemm / 2 / (num_weights - num_of_head),
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": 2 * num_weights,
    }


def count_weights(model: str) -> tuple[int, int]:
    """How many weights a model has, the head's once, and how many of them are the head's."""
    loaded = load_model(model)
    head: int = loaded.get_output_embeddings().weight.numel()
    return sum(weight.numel() for weight in loaded.parameters()), head


def read_rate(device: torch.device) -> float:
    """Bytes per second that a sum reads."""
    numbers = torch.ones(READ_BYTES[device.type] // 4, device=device)
    return numbers.nbytes / best_time(numbers.sum, device)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square product."""
    size = GEMM_SIZE[device.type]
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / best_time(lambda: a @ b, device)


def best_time(call: Callable[[], object], device: torch.device) -> float:
    """The fewest seconds that one of TRIES calls took."""
    best = float("inf")
    for _ in range(TRIES):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="bench.device")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("limits")
    measuring.add_argument("model")
    measuring.add_argument("device", type=torch.device)
    writing = commands.add_parser("adapters")
    writing.add_argument("model")
    writing.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "limits":
        limits = measure_limits(options.model, options.device)
        sys.stdout.write(json.dumps(limits) + "\n")
    else:
        add_adapters(load_model(options.model)).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
