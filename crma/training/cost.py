"""What runs cost, counted in examples and timed by the records of a machine."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from crma.core.provenance import hardware, machine_class
from crma.data.splits import load_split
from crma.training.arms import ARMS
from crma.training.config import TrainConfig
from crma.training.pairing import Record


class Cost(NamedTuple):
    """What runs cost, one after the other.

    Attributes:
        examples: that they train on, each as often as it is trained on.
        seconds: that they take on `machine`; None if there is no record of any.
        machine: the processor or GPU: this one, if it has made a record; otherwise the one that has
            made the most.
    """

    examples: int
    seconds: float | None
    machine: str


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


def estimate(configs: Sequence[TrainConfig], results: Path) -> Cost:
    """What runs cost by the records of one class of machine.

    Measuring is counted with training. Records of the same batch size are preferred, because
    smaller batches take longer for as many examples.

    Args:
        configs: of the runs.
        results: the folder of all records.
    """
    examples = sum(map(num_examples, configs))
    records = _of_one_machine(results)
    if not records:
        return Cost(examples, None, "")
    seconds = sum(_rate(records, each.batch_size) * num_examples(each) for each in configs)
    return Cost(examples, seconds, _name(records[0]["hardware"]))


def _of_one_machine(results: Path) -> list[Record]:
    """The records of this class of machine; without any, those of the class that has the most."""
    by_machine: dict[str, list[Record]] = {}
    for record in _records(results):
        by_machine.setdefault(_key(record["hardware"]), []).append(record)
    here = by_machine.get(_key(hardware()))
    return here or max(by_machine.values(), key=len, default=[])


def _records(results: Path) -> Iterator[Record]:
    for path in sorted(results.glob("*/*-seed*.json")):
        yield json.loads(path.read_text("utf-8"))


def _rate(records: Sequence[Record], batch_size: int) -> float:
    """The median seconds for an example."""
    alike = [each for each in records if each["config"]["batch_size"] == batch_size]
    rates = []
    for record in alike or records:
        config = TrainConfig.from_dict(record["config"])
        rates.append(record["wall_s"] / num_examples(config))
    return median(rates)


def _key(machine: dict[str, Any]) -> str:
    return json.dumps(machine_class(machine), sort_keys=True)


def _name(machine: dict[str, Any]) -> str:
    return machine["gpu"] or machine["cpu"]
