"""What a server costs on larger base models: measured on one model, and scaled by arithmetic.

`docs/cost.md` says what each figure means; its tables are made here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

from bench_results import bench_records
from paths import BENCH

RANK = 8  # of a LoRA on every linear
CRMA_RANK = 16  # of the folded pair of each block: 4 streams of rank 4, as shipped
BYTES = 2  # of a number in bfloat16
TASKS = (10, 100, 1000)
READ_BYTES_S = (
    3.35e12  # what an H100's memory can do by its maker's figure; nothing here measured it
)


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind.

    key_size: columns of the keys, and as many of the values. is_tied: the head is the embedding.
    """

    name: str
    num_layers: int
    hidden_size: int
    key_size: int
    intermediate_size: int
    num_tokens: int
    is_tied: bool = False

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the linears of a block."""
        h, kv, mlp = self.hidden_size, self.key_size, self.intermediate_size
        return (h, h), (h, kv), (h, kv), (h, h), (h, mlp), (h, mlp), (mlp, h)

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        h = self.hidden_size
        block = sum(inputs * outputs for inputs, outputs in self.linears) + 2 * h  # and two norms
        embeddings = (1 if self.is_tied else 2) * self.num_tokens * h
        return embeddings + self.num_layers * block + h

    @property
    def lora_numbers(self) -> int:
        """Of a LoRA of rank `RANK` on every linear: A and B."""
        return RANK * self.num_layers * sum(sum(linear) for linear in self.linears)

    @property
    def crma_numbers(self) -> int:
        """Of the folded backbone: a pair behind every block."""
        return 2 * CRMA_RANK * self.hidden_size * self.num_layers

    @property
    def kv_numbers(self) -> int:
        """Keys and values of one token."""
        return 2 * self.key_size * self.num_layers

    @property
    def slots(self) -> int:
        """LoRAs that take as much memory as the weights."""
        return self.num_parameters // self.lora_numbers


MEASURED = Shape("SmolLM2-135M", 30, 576, 192, 1536, 49152, is_tied=True)
BASES = (
    Shape("TinyLlama-1.1B", 22, 2048, 256, 5632, 32000),
    Shape("Mistral-7B", 32, 4096, 1024, 14336, 32000),
    Shape("Llama-3.1-70B", 80, 8192, 1024, 28672, 128256),
)


@cache
def _bench(name: str) -> Mapping[str, Any]:
    """The figures of our engine in bfloat16, on AMX, in a row of the benchmark."""
    return next(
        row
        for row in bench_records("amx")
        if (row.get("row"), row.get("engine")) == (name, "server")
    )


def load_seconds_a_byte() -> float:
    """Of the file of a LoRA, as `python -m bench.loads` measured it."""
    row = json.loads((BENCH / "loads.json").read_text("utf-8"))
    return row["load_s"]["median"] / row["file_bytes"]


def step_seconds(shape: Shape) -> float:
    """A step of 16 rows without adapters: that of the measured model, by numbers of parameters."""
    measured = _bench("base")["itl_p50_s"]["median"]
    return measured * shape.num_parameters / MEASURED.num_parameters


def added(shape: Shape, numbers: str, row: str) -> float:
    """What adapters add to a step, as a share of it.

    Args:
        shape: of the base model.
        numbers: the field of `Shape` with the adapter's numbers.
        row: of the benchmark: throughput with adapters, divided by that without.
    """
    measured = 1 / _bench(row)["ratio"]["median"] - 1
    share = getattr(shape, numbers) / shape.num_parameters
    return measured * share / (getattr(MEASURED, numbers) / MEASURED.num_parameters)


def base_rows() -> list[list[str]]:
    """One row a base model, the measured one first."""
    return [_base_row(shape) for shape in (MEASURED, *BASES)]


BASE_COLUMNS = (
    "base",
    "weights, GB",
    "KV cache, MB per 1,000 tokens",
    "LoRA, MB",
    "CRMA, MB",
    "load of a LoRA, s",
    "step of 16 rows on the CPU, s",
    "LoRAs add",
    "CRMA adds",
    "floor of a step on an H100, ms",
)


def _base_row(shape: Shape) -> list[str]:
    lora_bytes = shape.lora_numbers * BYTES
    weight_bytes = shape.num_parameters * BYTES
    return [
        shape.name,
        f"{weight_bytes / 1e9:.3g}",
        f"{shape.kv_numbers * BYTES * 1000 / 1e6:.3g}",
        f"{lora_bytes / 1e6:.3g}",
        f"{shape.crma_numbers * BYTES / 1e6:.3g}",
        f"{lora_bytes * load_seconds_a_byte():.2g}",
        f"{step_seconds(shape):.2g}",
        f"{added(shape, 'lora_numbers', 'mixed / base'):.1%}",
        f"{added(shape, 'crma_numbers', 'crma-on / crma-off'):.1%}",
        f"{weight_bytes / READ_BYTES_S * 1e3:.2g}",
    ]


SLOT_COLUMNS = ("base", "tasks", "all LoRAs, GB", "slots", "replicas that hold all")


def slot_rows() -> list[list[str]]:
    """One row for each base model and number of tasks."""
    rows = []
    for shape in BASES:
        for tasks in TASKS:
            slots = min(tasks, shape.slots)
            size = tasks * shape.lora_numbers * BYTES / 1e9
            rows.append(
                [shape.name, f"{tasks:,}", f"{size:.2g}", str(slots), str(ceil(tasks / slots))]
            )
    return rows
