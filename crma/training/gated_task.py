"""A task that the gate can score: its validation set, and the loss it was published with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from crma.core.digests import file_digest
from crma.core.errors import DataError
from crma.core.provenance import MACHINE, hardware
from crma.data.splits import load_split, split_path
from crma.evaluation.evaluator import Encoded
from crma.evaluation.offline import Served
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry
from crma.store.publication import backbones
from crma.training.config import TrainConfig, task_name


class GatedTask(NamedTuple):
    """A task that the gate can score.

    Attributes:
        entry: the task in the store.
        rows: its validation set.
        recorded: its loss there, in nats, when it was published.
    """

    entry: TaskEntry
    rows: list[Encoded]
    recorded: float

    @classmethod
    def of(cls, served: Served, entry: TaskEntry) -> "GatedTask":
        """Load the validation set and the recorded loss of a task.

        Raises:
            CrmaError: with the reason, if the validation set that the task was published with
                cannot be loaded.
        """
        name, manifest = entry.name, entry.manifest
        trained_on = manifest.trained_on
        measured = manifest.measured.get("validation")
        recorded = measured.get("loss") if isinstance(measured, dict) else None
        if trained_on is None or not isinstance(recorded, float):
            raise DataError("it recorded no validation loss", field="task", value=name)
        source = task_source(entry)
        examples = load_split(source, "validation")
        path = split_path(source, "validation")
        found = file_digest(path)
        published = trained_on.data.get(f"{name}/validation")
        if found != published:
            message = f"{path} is not the file that the task was published with"
            raise DataError(message, value=found, allowed=published)
        return cls(entry, served.evaluator(entry).encode(examples), recorded)


def conditions(dtype: object, backbone: str | None) -> dict[str, Any]:
    """What a loss that is measured now depends on beside the adapter, for its manifest.

    Args:
        dtype: torch's, of the model and the adapters.
        backbone: digest of the backbone it is measured under.
    """
    shown = str(dtype).removeprefix("torch.")
    return {"dtype": shown, "hardware": hardware(), "backbone": backbone}


def was_measured_here(entry: TaskEntry, here: Mapping[str, Any]) -> bool:
    """Whether the recorded loss of a task comes from this class of machine and this dtype.

    Args:
        entry: the task. A manifest that does not say where it was measured counts as elsewhere.
        here: as `conditions` returns it.
    """
    recorded = _recorded_conditions(entry)
    machine = recorded.get("hardware")
    if recorded.get("dtype") != here["dtype"] or not isinstance(machine, dict):
        return False
    return all(machine.get(key) == here["hardware"][key] for key in MACHINE)


def backbone_of_record(store: AdapterStore, entry: TaskEntry) -> BackboneEntry | None:
    """The backbone under which the recorded loss of a task was measured.

    A manifest that does not name it was written by the run that published the task, which measured
    it under the backbone that it published too.

    Returns:
        The backbone; None if the store does not hold it.
    """
    digest = _recorded_conditions(entry).get("backbone")
    if digest is not None:
        return store.find_backbone(digest)
    known = backbones(store.root).values()
    return next((each for each in known if _is_of_one_run(each, entry)), None)


def _recorded_conditions(entry: TaskEntry) -> Mapping[str, Any]:
    recorded = entry.manifest.measured.get("conditions")
    return recorded if isinstance(recorded, dict) else {}


def _is_of_one_run(backbone: BackboneEntry, task: TaskEntry) -> bool:
    made, trained = backbone.manifest.trained_on, task.manifest.trained_on
    if made is None or trained is None:
        return False
    return (made.config, made.seed, made.arm) == (trained.config, trained.seed, trained.arm)


def task_source(entry: TaskEntry) -> str:
    """The domain or folder that a task was trained on. Raises DataError if it is not recorded."""
    trained_on = entry.manifest.trained_on
    tasks = TrainConfig.from_dict(trained_on.config).tasks if trained_on is not None else ()
    for task in tasks:
        if task_name(task) == entry.name:
            return task
    message = "it does not say where its data is"
    raise DataError(message, field="task", value=entry.name)
