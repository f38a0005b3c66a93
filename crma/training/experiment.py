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
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from crma.training.endpoint import WINNER, Endpoint, Orders, order_of, read_endpoint
from crma.training.protocol import Run
from crma.training.record import Progress

Role = Literal["", "candidate", "rival", "winner", "winner_M=I", "winner_free-M", "best-rival"]
Report = Literal["regime", "ceiling", "screening", "endpoint", "continual"]
Record = dict[str, Any]


class Runs(Settings):
    """The runs of one arm, one for each seed.

    Attributes:
        arm: the arm's name.
        seeds: one run each.
        label: names the runs; the arm's name if empty.
        changes: changes to the configuration, applied last.
        role: what the runs are for, where something is decided by them. "candidate" and "rival":
            `screening`. The others are what that decides: in a study, the runs of these roles are
            those of the arms that it took; otherwise they are as the file says.
    """

    arm: ArmName
    seeds: tuple[int, ...] = Field(min_length=1)
    label: str = Field("", pattern=r"^[\w.=-]*$")
    changes: dict[str, Any] = Field({})
    role: Role = ""

    @property
    def name(self) -> str:
        """The label that its records have."""
        return self.label or self.arm


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
            goes into every record. The report "endpoint" gives its verdict.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    config: dict[str, Any]
    arms: dict[ArmName, dict[str, Any]] = Field({})
    runs: tuple[Runs, ...] = Field(min_length=1)
    orders: Orders = ()
    report: Report | None = None
    endpoint: str = ""

    def judged_by(self) -> Endpoint | None:
        """The endpoint that it names, if it names one.

        Raises:
            ConfigError: as `read_endpoint`; or the endpoint judges the winner, and not one arm of
                the experiment is that.
        """
        if not self.endpoint:
            return None
        endpoint = read_endpoint(Path(self.endpoint))
        if endpoint.arm != WINNER or self.report != "endpoint":
            return endpoint
        winners = [runs.arm for runs in self.runs if runs.role == "winner"]
        if len(winners) != 1:
            message = "the endpoint judges the winner, and not one arm of the experiment is that"
            raise ConfigError(message, field="role", value=winners, allowed="one winner")
        return endpoint.model_copy(update={"arm": winners[0]})

    def named(self, label: str) -> Runs:
        """The runs of a label. Raises ConfigError if there are none."""
        for runs in self.runs:
            if runs.name == label:
                return runs
        message = f"{self.name} has no runs with the label {label}"
        allowed = [runs.name for runs in self.runs]
        raise ConfigError(message, field="label", value=label, allowed=allowed)

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
                name = f"{runs.name}-seed{seed}"
                if name in planned:
                    message = "two runs have the same name"
                    raise ConfigError(
                        message, field="label", value=name, allowed="a label for each"
                    )
                values = {**self.config, "arm": runs.arm, "seed": seed}
                if self.orders:
                    values["tasks"] = list(order_of(seed, self.orders))
                values = merged(values, self.arms.get(runs.arm, {}))
                values = merged(values, runs.changes)
                planned[name] = TrainConfig.from_dict(values)
                self._check_reserve(planned[name])
        return planned

    def _check_reserve(self, config: TrainConfig) -> None:
        """Raise ConfigError if a run asks the reserve, and no endpoint that was written down
        before is what it is asked for.
        """
        is_judged = self.endpoint and self.report == "endpoint"
        if "reserve" in config.measure and not is_judged:
            message = "the reserve is asked only for an endpoint that was written down before"
            allowed = 'the file of an endpoint, and report = "endpoint"'
            raise ConfigError(message, field="endpoint", value=self.endpoint, allowed=allowed)


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
    endpoint = experiment.judged_by()
    digest = None if endpoint is None else endpoint.digest
    paths = {name: record_path(experiment, results, name) for name in configs}
    for name, path in paths.items():
        if path.exists():
            _check_record(path, name, configs[name], digest)
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
    make(experiment, results, work, runs.missing, report=report, runner=runner)
    return [path for path in runs.paths.values() if path.exists()]


def make(
    experiment: Experiment,
    results: Path,
    work: Path,
    names: Iterable[str],
    *,
    report: Progress,
    runner: Runner,
) -> None:
    """Make the records of the runs with these names. The rest as in `execute`."""
    configs = experiment.planned()
    endpoint = experiment.judged_by()
    folder = work / experiment.name
    runs = {name: MissingRun(configs[name], folder / name) for name in names}
    for name, record in runner(experiment.name, runs, report):
        if endpoint is not None:
            record["endpoint"] = endpoint.digest
        path = record_path(experiment, results, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(record))


def record_path(experiment: Experiment, results: Path, name: str) -> Path:
    """Where the record of a run is or will be."""
    return results / experiment.name / f"{name}.json"


def _check_record(path: Path, name: str, config: TrainConfig, endpoint: str | None) -> None:
    """Raise TrainingError if a record was made with another configuration or endpoint."""
    record = json.loads(path.read_text())
    recorded = TrainConfig.from_dict(record["config"])
    if recorded != config:
        message = (
            f"{path} was made with another configuration; delete it, or give the run another label"
        )
        raise TrainingError(message, field=name, value=str(path), allowed="the same configuration")
    if endpoint is not None and record.get("endpoint") != endpoint:
        message = f"{path} was made before the endpoint was written down, or under another one"
        value = record.get("endpoint")
        raise TrainingError(message, field="endpoint", value=value, allowed=endpoint)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` updated with `changes`; nested tables are merged, not replaced."""
    result = dict(values)
    for key, new in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            result[key] = merged(old, new)
        else:
            result[key] = new
    return result
