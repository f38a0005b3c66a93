"""What runs cost, counted in examples and timed by records of the same machine."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from crma.core.provenance import hardware, machine_class
from crma.data.splits import load_split
from crma.training.arms import ARMS
from crma.training.config import TrainConfig


def num_examples(config: TrainConfig) -> int:
    """How many examples a run trains on, each as often as it is trained on.

    Raises DataError if the run trains on whole splits and one of them is not built.
    """
    sizes = [config.train_items or len(load_split(task, "train")) for task in config.tasks]
    once = sum(sizes)
    pretrained_on = ARMS[config.arm].pretrained_on
    if pretrained_on == "union":
        once += sum(sizes)
    elif pretrained_on == "others":
        once += (len(sizes) - 1) * sum(sizes)
    return once * config.epochs


def seconds_per_example(results: Path, batch_size: int) -> float | None:
    """The median over records of runs on this class of machine; None if there is none.

    Measuring is counted with training. Records of the same batch size are preferred.

    Args:
        results: the folder of all records.
        batch_size: smaller batches take longer for as many examples.
    """
    here = machine_class(hardware())
    made = [each for each in _records(results) if machine_class(each["hardware"]) == here]
    alike = [each for each in made if each["config"]["batch_size"] == batch_size]
    rates = [_rate(record) for record in alike or made]
    return median(rates) if rates else None


def _records(results: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(results.glob("*/*-seed*.json")):
        yield json.loads(path.read_text("utf-8"))


def _rate(record: dict[str, Any]) -> float:
    config = TrainConfig.from_dict(record["config"])
    return record["wall_s"] / num_examples(config)


def estimate(configs: Sequence[TrainConfig], results: Path) -> tuple[int, float | None]:
    """The examples that runs train on, and the seconds they take one after the other.

    Args:
        configs: of the runs.
        results: the folder of all records.

    Returns:
        The seconds are None if this class of machine has made no record.
    """
    total = 0
    seconds: float | None = 0.0
    rates: dict[int, float | None] = {}
    for config in configs:
        if config.batch_size not in rates:
            rates[config.batch_size] = seconds_per_example(results, config.batch_size)
        examples = num_examples(config)
        total += examples
        rate = rates[config.batch_size]
        seconds = None if seconds is None or rate is None else seconds + rate * examples
    return total, seconds
