"""What two runs must share for a difference between them to be one of their arms.

Arms whose runs share start, order and settings differ by 1 to 3.5 % from seed to seed; unpaired
ones by 12 %. So a comparison of unpaired runs is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch

from crma.core.errors import ConfigError
from crma.core.provenance import machine_class
from crma.training.config import TrainConfig, task_name

Record = Mapping[str, Any]

# Keys of a configuration that are no part of an arm.
SHARED = (
    "seed",
    "epochs",
    "batch_size",
    "train_items",
    "warmup",
    "ema",
    "clip",
    "weight_decay",
    "prompt_format",
    "measure",
)


def conditions(
    config: TrainConfig, digests: Mapping[str, Any], dtype: torch.dtype, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run shares with those that it may be compared with, for its record.

    Args:
        config: the run's.
        digests: of the base model and the data, as the record holds them.
        dtype: of the base model and the activations, whatever the configuration asked for.
        machine: as `provenance.hardware` returns it.
    """
    lora = config.lora
    return {
        **{key: getattr(config, key) for key in SHARED},
        "order": [task_name(task) for task in config.tasks],
        "lora.lr": lora.lr,
        "lora.scaling": lora.alpha / lora.rank,
        "lora.drawn_rank": lora.drawn_rank or lora.rank,
        "lora.target_modules": lora.target_modules,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine_class(machine),
        "base": digests["base"],
        "data": digests["data"],
    }


def check_paired(one: Record, other: Record) -> None:
    """Raise ConfigError if a difference between two records could be one of their conditions.

    The error names the first condition that differs.
    """
    for record in (one, other):
        if "pairing" not in record:
            message = (
                f"the record of {record['arm']}, seed {record['seed']}, does not say what it "
                "shares with others: it is of an earlier version; run it again"
            )
            raise ConfigError(message, field="pairing", allowed="a record with its conditions")
    first, second = one["pairing"], other["pairing"]
    for field in dict.fromkeys([*first, *second]):
        if first.get(field) != second.get(field):
            message = (
                f"{one['arm']} and {other['arm']} cannot be compared: their runs of seed "
                f"{one['seed']} and {other['seed']} differ in more than the arm"
            )
            value, allowed = second.get(field), first.get(field)
            raise ConfigError(message, field=field, value=value, allowed=allowed)


def is_paired(one: Record, other: Record) -> bool:
    """Whether `check_paired` would not raise."""
    try:
        check_paired(one, other)
    except ConfigError:
        return False
    return True
