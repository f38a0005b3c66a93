"""`python -m bench.loads`: how long it takes to load an adapter from a store into memory.

It prints a line of JSON: the CPU seconds of a load, from the file to the layout that serves, of
LoRAs of rank 8 on every linear of the default base model; each is loaded once.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from crma.core.provenance import commit, hardware
from crma.method.injection import Injection, target_names
from crma.method.lora import Lora, LoraConfig, LoraPair, match_targets
from crma.models.base_model import DEFAULT_MODEL, find_base
from crma.models.loading import load_model, resolve_device, resolve_dtype
from crma.models.model_shape import read_shape
from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES
from server.engine.native.adapter_pool import AdapterPool

RANK = 8
NUM_ADAPTERS = 32


def random_lora(injection: Injection) -> Lora:
    """A LoRA on every linear, small enough to be finite as it serves."""
    targets = target_names(injection.model, "all-linear")
    pairs = {}
    for path in match_targets(targets, injection.shapes):
        outputs, inputs = injection.shapes[path]
        pairs[path] = LoraPair(torch.randn(RANK, inputs), torch.randn(outputs, RANK), 0.01)
    return Lora(LoraConfig(RANK, 0.01 * RANK, targets), pairs)


def main() -> None:
    """Measure and print."""
    base = find_base(DEFAULT_MODEL)
    device = resolve_device("cpu")
    injection = Injection(load_model(base, device, resolve_dtype("auto", device)))
    shape = read_shape(base)
    pool = AdapterPool(injection, NUM_ADAPTERS)
    times = []
    with TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder))
        for number in range(NUM_ADAPTERS):
            entry = store.publish_task(
                f"lora-{number}",
                random_lora(injection),
                backbone=None,
                prompt_format=None,
                base=base,
                trained_on=None,
                measured={},
                licence="unknown",
            )
            pool.register(entry.digest, partial(entry.load, shape))
            started = time.process_time()
            pool.load(entry.digest)
            times.append(time.process_time() - started)
        file_bytes = (entry.path / TASK_FILES[1]).stat().st_size
    row = {
        "load_s": {"median": median(times), "min": min(times), "max": max(times)},
        "file_bytes": file_bytes,
        "commit": commit(),
        "hardware": hardware(),
    }
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
