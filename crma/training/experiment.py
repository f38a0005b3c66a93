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
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from crma.core.errors import ConfigError, TrainingError
from crma.core.files import replace_file, to_json
from crma.core.json_lines import checked
from crma.models.base_model import find_base
from crma.training.arms import ArmName
from crma.training.config import Settings, TrainConfig, read_toml
from crma.training.endpoint import Endpoint, Orders, order_of, read_endpoint
from crma.training.protocol import Run
from crma.training.record import Progress

Record = dict[str, Any]


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
    """The content of an experiment's file.

    Attributes:
        name: of the folder of its records.
        config: shared by all runs.
        arms: changes for single arms.
        runs: one item for each arm.
        orders: if there are any, a run takes its tasks in the order that its seed has
            (`endpoint.order_of`).
        report: what is said of the records beside the table of arms.
        endpoint: the file of the endpoint, beside that of the experiment; empty: none. Its digest
            goes into every record.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    config: dict[str, Any]
    arms: dict[ArmName, dict[str, Any]] = Field({})
    runs: tuple[Runs, ...] = Field(min_length=1)
    orders: Orders = ()
    report: Literal["regime", "ceiling"] | None = None
    endpoint: str = ""

    def judged_by(self) -> Endpoint | None:
        """The endpoint that it names, if it names one. Raises as `read_endpoint`."""
        return read_endpoint(Path(self.endpoint)) if self.endpoint else None

    def planned(self) -> dict[str, TrainConfig]:
        """The configuration of every run, by record name, in the order of the file.

        A run's configuration is the shared table, then its arm's table, then its own changes.

        Raises:
            ConfigError: an invalid key, two runs with the same name, or a run that asks the reserve
                without an endpoint.
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
                if self.orders:
                    values["tasks"] = list(order_of(seed, self.orders))
                values = _merged(values, self.arms.get(runs.arm, {}))
                values = _merged(values, runs.changes)
                planned[name] = TrainConfig.from_dict(values)
                self._check_reserve(planned[name])
        return planned

    def _check_reserve(self, config: TrainConfig) -> None:
        """Raise ConfigError if a run asks the reserve, and no endpoint was written down before."""
        if "reserve" in config.measure and not self.endpoint:
            message = "the reserve is asked only for an endpoint that was written down before"
            raise ConfigError(
                message, field="endpoint", value="", allowed="the file of an endpoint"
            )


class Plan(NamedTuple):
    """The runs of an experiment.

    Attributes:
        configs: record name -> configuration, of all runs.
        paths: record name -> where its record is or will be.
        missing: the names of the runs to make, in order.
    """

    configs: dict[str, TrainConfig]
    paths: dict[str, Path]
    missing: list[str]


def read_experiment(path: Path) -> Experiment:
    """Read a TOML file. Raises ConfigError that names the first invalid key."""
    experiment = checked("", read_toml(path), Experiment.model_validate, ConfigError)
    if not experiment.endpoint:
        return experiment
    return experiment.model_copy(update={"endpoint": str(path.parent / experiment.endpoint)})


def plan(experiment: Experiment, results: Path, *, only: str) -> Plan:
    """Which runs there are, and which have no record yet. Arguments and errors as in `execute`."""
    configs = experiment.planned()
    paths = {name: results / experiment.name / f"{name}.json" for name in configs}
    for name, path in paths.items():
        if path.exists():
            _check_record(path, name, configs[name])
    missing = [name for name in configs if fnmatch(name, only) and not paths[name].exists()]
    return Plan(configs, paths, missing)


class MissingRun(NamedTuple):
    """A run without a record, and its folder, which is needed only until it has one."""

    config: TrainConfig
    folder: Path

    def execute(self, report: Progress) -> Record:
        """Train and measure it. Raises ConfigError in one of several processes, and as `Run`."""
        run = Run(self.config, find_base(self.config.model), self.folder, report)
        if run.ranks.size > 1:
            message = "an experiment runs in one process: divide its runs with --only, or use --ray"
            raise ConfigError(message, field="ranks", value=run.ranks.size, allowed=1)
        return run.execute()


Runner = Callable[[str, Mapping[str, MissingRun], Progress], Iterator[tuple[str, Record]]]
"""Given an experiment's name and runs: the name and record of each run, as soon as it is made."""


def one_by_one(
    name: str, runs: Mapping[str, MissingRun], report: Progress
) -> Iterator[tuple[str, Record]]:
    """The `Runner` that makes one run after the other, here."""
    for done, (each, run) in enumerate(runs.items()):
        report(name, done, len(runs))
        yield each, run.execute(report)


def execute(
    experiment: Experiment,
    results: Path,
    work: Path,
    *,
    only: str,
    report: Progress,
    runner: Runner = one_by_one,
) -> list[Path]:
    """Make every missing record. Each is written as soon as its run has ended.

    Args:
        experiment: the runs to make.
        results: records are written to `<results>/<experiment>/<run>.json`.
        work: run folders are `<work>/<experiment>/<run>`.
        only: a pattern of run names, such as "*-seed0", so that several machines or processes can
            divide an experiment among them.
        report: called with (description, done, total), for the experiment and for its runs.
        runner: makes the runs.

    Returns:
        The paths of all records that exist.

    Raises:
        TrainingError: an existing record was made with another configuration, or a run failed one
            of its checks.
    """
    runs = plan(experiment, results, only=only)
    endpoint = experiment.judged_by()
    folder = work / experiment.name
    missing = {name: MissingRun(runs.configs[name], folder / name) for name in runs.missing}
    for name, record in runner(experiment.name, missing, report):
        if endpoint is not None:
            record["endpoint"] = endpoint.digest
        path = runs.paths[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(record))
    return [path for path in runs.paths.values() if path.exists()]


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
