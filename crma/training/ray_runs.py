"""The runs of an experiment on a Ray cluster: each is a task of its own."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError, CrmaError, TrainingError
from crma.training.experiment import MissingRun, Record
from crma.training.record import Progress, silent

MAX_RETRIES = 1  # of a run whose machine is lost


@dataclass(frozen=True)
class RayRuns:
    """The `Runner` that makes runs in parallel, as many as the cluster has CPUs and GPUs for.

    A machine of the cluster needs the base model and the data where this one has them.

    Args:
        address: of the cluster; None: what RAY_ADDRESS says, or one that runs here, or a new one
            on this machine.
        num_cpus: CPUs of a run, and its threads.
        num_gpus: GPUs of a run.
    """

    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __call__(
        self, name: str, runs: Mapping[str, MissingRun], report: Progress
    ) -> Iterator[tuple[str, Record]]:
        """The records, in the order in which they are made.

        Raises:
            ConfigError: Ray is not installed.
            CrmaError: a run failed; the others have ended before that.
        """
        if not runs:
            return
        ray = _ray()
        if not ray.is_initialized():
            ray.init(self.address, include_dashboard=False)
        task = ray.remote(_execute).options(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=MAX_RETRIES
        )
        here = Path.cwd()
        names = {task.remote(run, here): each for each, run in runs.items()}
        failure: Exception | None = None
        while names:
            report(name, len(runs) - len(names), len(runs))
            (ended,), _ = ray.wait(list(names), num_returns=1)
            run_name = names.pop(ended)
            try:
                result = ray.get(ended)
            except ray.exceptions.RayError as error:
                message = f"run {run_name} failed: {error}"
                failure = failure or TrainingError(message, field="runs", value=run_name)
                continue
            if isinstance(result, CrmaError):
                failure = failure or result
                continue
            yield run_name, result
        if failure is not None:
            raise failure


def _execute(run: MissingRun, here: Path) -> Record | CrmaError:
    """Make a run in a process of the cluster; an error of ours crosses as it is.

    Args:
        here: the folder that relative paths are meant from, where this machine has it.
    """
    place = contextlib.chdir(here) if here.is_dir() else contextlib.nullcontext()
    with place:
        try:
            return run.execute(silent)
        except CrmaError as error:
            return error


def _ray() -> Any:
    """Ray, which does not report its use. Raises ConfigError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before a cluster starts
    try:
        import ray
    except ImportError:
        message = "--ray needs Ray: pip install 'crma-server[ray]'"
        raise ConfigError(
            message, field="ray", value="not installed", allowed="installed"
        ) from None
    return ray
