"""The records that runs are compared with: those of the same seed, on the same class of machine."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crma.core.errors import TrainingError
from crma.core.provenance import hardware, machine_class
from crma.training.experiment import Plan


def strangers(runs: Plan, names: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """The records that runs made here could not be compared with.

    Args:
        runs: of a phase.
        names: those that are to be made here. Their partners have the same seed.

    Returns:
        Path -> the class of machine on which it was made, which is not that of this one.
    """
    here = machine_class(hardware())
    seeds = {runs.configs[name].seed for name in names}
    found = {}
    for name, path in runs.paths.items():
        if runs.configs[name].seed in seeds and path.exists():
            machine = json.loads(path.read_text("utf-8"))["pairing"]["machine"]
            if machine != here:
                found[path] = machine
    return found


def refuse(found: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise TrainingError if there are any `strangers`."""
    if not found:
        return
    path, machine = next(iter(found.items()))
    message = (
        f"{len(found)} records of the seeds to go on with are of another class of machine; runs of "
        "two classes are no pair: go on there, or drop those records (--fresh-class)"
    )
    value, allowed = _named(machine_class(hardware())), _named(machine)
    raise TrainingError(message, field=path.stem, value=value, allowed=allowed)


def _named(machine: Mapping[str, Any]) -> str:
    """A class of machine in words."""
    return str(machine["gpu"] or f"{machine['cpu']} ({machine['capability']})")
