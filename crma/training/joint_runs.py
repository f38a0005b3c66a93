"""Runs of an experiment that train at once, on one base model in one process."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import ceil

import torch

from crma.models.base_model import find_base
from crma.training.config import TrainConfig
from crma.training.cuda_tape import CudaTape
from crma.training.experiment import MissingRun, Record
from crma.training.joint_trainer import OWN, train_together
from crma.training.protocol import Run
from crma.training.record import Progress
from crma.training.recorded_pass import Recorder
from crma.training.training_model import TrainingModel, load_training_model


def all_at_once(
    name: str, runs: Mapping[str, MissingRun], report: Progress, *, graphs: bool = True
) -> Iterator[tuple[str, Record]]:
    """The `Runner` that trains all runs together. They are of one group (`groups`).

    Args:
        name: of the experiment.
        runs: those of the group.
        report: called with (description, done, total).
        graphs: on a GPU, record passes as CUDA graphs.
    """
    made = []
    for run in runs.values():
        loaded = _loaded(run.config.model, run.config.dtype)
        base = find_base(run.config.model)
        made.append(Run(run.config, base, run.folder, report, loaded))
    report(name, 0, len(made))
    recorder = _recorder(graphs=graphs)
    records = train_together([run.training(at_once=True) for run in made], recorder)
    recorder.forget()
    if torch.cuda.is_available() and not recorder.failed:
        torch.cuda.empty_cache()  # other processes share the device
    yield from zip(runs, records, strict=True)


def groups(configs: Mapping[str, TrainConfig], most: int) -> list[list[str]]:
    """The names of runs, divided into those that differ only in seed and order of tasks.

    Args:
        configs: run name -> its configuration.
        most: runs in a group; larger ones are divided evenly.
    """
    alike: dict[str, list[str]] = {}
    for name, config in configs.items():
        settings = config.model_dump_json(exclude=OWN)
        key = f"{settings} {sorted(config.tasks)}"
        alike.setdefault(key, []).append(name)
    found: list[list[str]] = []
    for names in alike.values():
        size = ceil(len(names) / ceil(len(names) / most))
        found += [names[start : start + size] for start in range(0, len(names), size)]
    return found


@lru_cache(maxsize=1)
def _recorder(*, graphs: bool) -> Recorder:
    """That of the process: it remembers if nothing can be recorded here."""
    return Recorder(CudaTape() if graphs and torch.cuda.is_available() else None)


@lru_cache(maxsize=1)
def _loaded(model: str, dtype: str) -> TrainingModel:
    """The base model, which stays loaded in a process that makes one group after the other."""
    return load_training_model(find_base(model), dtype)
