"""An experiment: many runs of the sequential protocol from one TOML file, with one record for each.

    name = "quick"
    [config]              # shared by all runs: a TrainConfig
    [arms.FROZEN-matched] # changes for one arm
    [[runs]]              # one table for each arm: its seeds, and a label if needed
    arm = "MODULAR"
    seeds = [0, 42]

A run whose record exists is skipped, so a killed experiment resumes where it stopped.
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
from crma.training.protocol import Run
from crma.training.record import Progress


class Runs(Settings):
    """The runs of one arm, one for each seed.

    Attributes:
        arm: the arm's name.
        seeds: one run each.
        label: names the runs; the arm's name if empty.
        changes: changes to the configuration, applied last.
    """

    arm: ArmName
    seeds: tuple[int, ...] = Field(min_length=1)
    label: str = Field("", pattern=r"^[\w.=-]*$")
    changes: dict[str, Any] = Field({})


class Experiment(Settings):
    """The content of an experiment's file."""

    name: str = Field(pattern=r"^[\w-]+$")
    config: dict[str, Any]
    arms: dict[ArmName, dict[str, Any]] = Field({})
    runs: tuple[Runs, ...] = Field(min_length=1)

    def planned(self) -> dict[str, TrainConfig]:
        """The configuration of every run, by record name, in the order of the file.

        A run's configuration is the shared table, then its arm's table, then its own changes.

        Raises:
            ConfigError: an invalid key, or two runs with the same name.
        """
        planned: dict[str, TrainConfig] = {}
        for runs in self.runs:
            for seed in runs.seeds:
                name = f"{runs.label or runs.arm}-seed{seed}"
                if name in planned:
                    message = "two runs have the same name"
                    raise ConfigError(
                        message, field="label", value=name, allowed="a label for each"
                    )
                values = {**self.config, "arm": runs.arm, "seed": seed}
                values = _merged(values, self.arms.get(runs.arm, {}))
                values = _merged(values, runs.changes)
                planned[name] = TrainConfig.from_dict(values)
        return planned


def read_experiment(path: Path) -> Experiment:
    """Read a TOML file. Raises ConfigError that names the first invalid key."""
    return checked("", read_toml(path), Experiment.model_validate, ConfigError)


def execute(
    experiment: Experiment, results: Path, work: Path, *, only: str, report: Progress
) -> list[Path]:
    """Make every missing record, one run after the other.

    Args:
        experiment: the runs to make.
        results: records are written to `<results>/<experiment>/<run>.json`.
        work: run folders are `<work>/<experiment>/<run>`; they are needed only until their record
            exists.
        only: a pattern of run names, such as "*-seed0", so that several machines or processes can
            divide an experiment among them.
        report: called with (description, done, total), for the experiment and for its runs.

    Returns:
        The paths of all records that exist.

    Raises:
        TrainingError: an existing record was made with another configuration, or a run failed one
            of its checks.
    """
    planned = experiment.planned()
    paths = {name: results / experiment.name / f"{name}.json" for name in planned}
    for name, path in paths.items():
        if path.exists():
            _check_record(path, name, planned[name])
    missing = [name for name in planned if fnmatch(name, only) and not paths[name].exists()]
    for done, name in enumerate(missing):
        report(experiment.name, done, len(missing))
        config = planned[name]
        run = Run(config, find_base(config.model), work / experiment.name / name, report)
        if run.ranks.size > 1:
            message = "an experiment runs in one process: divide its runs with --only"
            raise ConfigError(message, field="ranks", value=run.ranks.size, allowed=1)
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        replace_file(paths[name], to_json(run.execute()))
    return [path for path in paths.values() if path.exists()]


def _check_record(path: Path, name: str, config: TrainConfig) -> None:
    """Raise TrainingError if the record was made with another configuration."""
    recorded = TrainConfig.from_dict(json.loads(path.read_text())["config"])
    if recorded != config:
        message = (
            f"{path} was made with another configuration; delete it, or give the run another label"
        )
        raise TrainingError(message, field=name, value=str(path), allowed="the same configuration")


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` updated with `changes`; nested tables are merged, not replaced."""
    merged = dict(values)
    for key, new in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            merged[key] = _merged(old, new)
        else:
            merged[key] = new
    return merged
