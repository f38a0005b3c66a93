"""An experiment: many runs of the sequential protocol, from one TOML file, to one record a run.

    name = "quick"
    [config]              # what every run shares: a TrainConfig
    [arms.FROZEN-matched] # what an arm has of its own
    [[runs]]              # one line an arm: its seeds, and a label where the arm's name says too little
    arm = "MODULAR"
    seeds = [0, 42]

A record that is there is not made again, so a killed experiment goes on where it was.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import Field

from crma.core.errors import ConfigError, TrainingError
from crma.core.files import replace_file, to_json
from crma.core.json_lines import checked
from crma.models.base_model import find_base
from crma.training.arms import ArmName
from crma.training.config import Settings, TrainConfig, read_toml
from crma.training.protocol import Progress, Run


class Runs(Settings):
    """Runs of one arm: `changes` to the configuration come last, `label` names them (the arm's name, if not given)."""

    arm: ArmName
    seeds: tuple[int, ...] = Field(min_length=1)
    label: str = Field("", pattern=r"^[\w.=-]*$")
    changes: dict[str, Any] = Field({})


class Experiment(Settings):
    """The file."""

    name: str = Field(pattern=r"^[\w-]+$")
    config: dict[str, Any]
    arms: dict[ArmName, dict[str, Any]] = Field({})
    runs: tuple[Runs, ...] = Field(min_length=1)

    def planned(self) -> dict[str, TrainConfig]:
        """Record name -> configuration, in order. Raises ConfigError for a wrong key, or a name that comes twice."""
        found: dict[str, TrainConfig] = {}
        for runs in self.runs:
            for seed in runs.seeds:
                name = f"{runs.label or runs.arm}-seed{seed}"
                if name in found:
                    raise ConfigError(
                        "two runs have one name", field="label", value=name, allowed="a label each"
                    )
                values = {**self.config, "arm": runs.arm, "seed": seed}
                for changes in (self.arms.get(runs.arm, {}), runs.changes):
                    values = _merged(values, changes)
                found[name] = TrainConfig.from_dict(values)
        return found


def read_experiment(path: Path) -> Experiment:
    """From a TOML file. Raises ConfigError that names the first wrong key."""
    return checked("", read_toml(path), Experiment.model_validate, ConfigError)


def execute(
    experiment: Experiment, results: Path, work: Path, *, only: str, report: Progress
) -> list[Path]:
    """Make every record that is missing, one run after the other.

    Args:
        results: records go to `<results>/<experiment>/<run>.json`.
        work: run folders, `<work>/<experiment>/<run>`; needed only until their record is there.
        only: a pattern of run names, such as "*-seed0": so several machines, or processes, share an experiment.

    Returns:
        The paths of all records that are there.

    Raises:
        TrainingError: a record is there that another configuration made, or a run failed one of its checks.
    """
    planned = experiment.planned()
    paths = {name: results / experiment.name / f"{name}.json" for name in planned}
    for name, path in paths.items():
        if (
            path.exists()
            and TrainConfig.from_dict(json.loads(path.read_text())["config"]) != planned[name]
        ):
            message = f"{path} was made with another configuration; delete it, or give the run another label"
            raise TrainingError(
                message, field=name, value=str(path), allowed="the same configuration"
            )
    missing = [name for name in planned if fnmatch(name, only) and not paths[name].exists()]
    for done, name in enumerate(missing):
        report(experiment.name, done, len(missing))
        run = Run(
            planned[name], find_base(planned[name].model), work / experiment.name / name, report
        )
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        replace_file(paths[name], to_json(run.execute()))
    return [path for path in paths.values() if path.exists()]


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` on top of `values`, table by table."""
    merged = dict(values)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged
