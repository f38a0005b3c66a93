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
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from crma.arms import ArmName
from crma.config import TrainConfig, read_toml
from crma.errors import ConfigError, TrainingError
from crma.files import replace_file, to_json
from crma.json_lines import checked

if TYPE_CHECKING:
    from crma.protocol import Run

Report = Callable[[str, str, int, int], None]
"""Called with the name of a run, what it does, and how much of that is done and to do; from other threads."""


class Runs(BaseModel):
    """Runs of one arm: `changes` to the configuration come last, `label` names them (the arm's name, if not given)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: ArmName
    seeds: tuple[int, ...] = Field(min_length=1)
    label: str = Field("", pattern=r"^[\w.=-]*$")
    changes: dict[str, Any] = {}


class Experiment(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w-]+$")
    config: dict[str, Any]
    arms: dict[ArmName, dict[str, Any]] = {}
    runs: tuple[Runs, ...] = Field(min_length=1)

    def planned(self) -> dict[str, TrainConfig]:
        """Record name -> configuration, in order. Raises ConfigError for a wrong key, or a name that comes twice."""
        found: dict[str, TrainConfig] = {}
        for runs in self.runs:
            for seed in runs.seeds:
                name = f"{runs.label or runs.arm}-seed{seed}"
                if name in found:
                    raise ConfigError("two runs have one name", field="label", value=name, allowed="a label each")
                own: dict[str, Any] = {"arm": runs.arm, "seed": seed}
                for changes in (self.arms.get(runs.arm, {}), runs.changes):
                    own = _merged(own, changes)
                found[name] = TrainConfig.from_dict(_merged(self.config, own))
        return found


def read_experiment(path: Path) -> Experiment:
    """From a TOML file. Raises ConfigError that names the first wrong key."""
    return checked("", read_toml(path), Experiment.model_validate, ConfigError)


def execute(experiment: Experiment, results: Path, work: Path, *, jobs: int, report: Report) -> list[Path]:
    """Make every record that is missing, `jobs` runs at a time with an equal share of the cores each.

    Args:
        results: records go to `<results>/<experiment>/<run>.json`.
        work: run folders, `<work>/<experiment>/<run>`; needed only until their record is there.

    Returns:
        The paths of all records.

    Raises:
        TrainingError: a record is there that another configuration made, or a run failed one of its checks; the runs
            that were going on are finished first.
    """
    planned = experiment.planned()
    paths = {name: results / experiment.name / f"{name}.json" for name in planned}
    for name, path in paths.items():
        if path.exists() and json.loads(path.read_text())["config"] != planned[name].model_dump(mode="json"):
            message = f"{path} was made with another configuration; delete it, or give the run another label"
            raise TrainingError(message, field=name, value=str(path), allowed="the same configuration")
    missing = {name: config for name, config in planned.items() if not paths[name].exists()}
    if not missing:
        return list(paths.values())
    folder, threads = work / experiment.name, max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        told = manager.Queue()
        listener = Thread(target=_listen, args=(told, report))
        listener.start()
        futures = [pool.submit(_run, n, config, folder, paths[n], threads, told) for n, config in missing.items()]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            told.put(None)
            listener.join()
    return list(paths.values())


def _listen(told: Any, report: Report) -> None:
    while (item := told.get()) is not None:
        report(*item)


def _run(name: str, config: TrainConfig, folder: Path, record: Path, threads: int, told: Any) -> None:
    """One run in a process of its own; its record is copied when all of it is there."""
    import torch  # in the worker: the parent of these processes needs none of it

    from crma.protocol import Run
    from crma.pull import find_base

    torch.set_num_threads(threads)

    def progress(what: str, done: int, total: int) -> None:
        told.put((name, what, done, total))

    run = Run(config, find_base(config.model), folder / name, progress)
    if source := _same_first_task(run, folder):
        run.fork(source)
    record.parent.mkdir(parents=True, exist_ok=True)
    replace_file(record, to_json(run.execute()))
    told.put((name, "done", 1, 1))


def _same_first_task(run: "Run", folder: Path) -> Path | None:
    """A run folder whose first task is trained and is what this run would train first."""
    for stats in sorted(folder.glob(f"*/work/{run.stages[0][0]}/stats.json")):
        if json.loads(stats.read_text())["key"] == run.first_task_key():
            return stats.parents[2]
    return None


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` on top of `values`, table by table."""
    merged = dict(values)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
