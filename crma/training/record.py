"""The record of a run: its losses and accuracies, what follows from them, and their provenance.

Shapes: T tasks and N stages. `loss[i][t]` is L_{i,t} of docs/method.md: task t after stage i; row 0
is the base model.
"""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from crma.core.provenance import commit, hardware
from crma.data.splits import SPLITS
from crma.evaluation.evaluator import Encoded, Evaluator, ItemMeasure, Measure
from crma.method.certificate import certify
from crma.training import backbone_log
from crma.training.config import TrainConfig, task_name
from crma.training.drift import measures
from crma.training.pairing import conditions
from crma.training.snapshots import Snapshots, split_digests

Progress = Callable[[str, int, int], None]  # (description, done, total)
Items = list[ItemMeasure]  # of one task, in the order of its examples


def silent(description: str, done: int, total: int) -> None:
    """The progress of a process whose work another one shows."""


def measure_stages(
    snapshots: Snapshots,
    evaluator: Evaluator,
    rows: Mapping[str, list[Encoded]],
    progress: Progress,
) -> list[list[Items | None]]:
    """Measure every task after every stage, from the published snapshots.

    A task that is served by the same adapters as before, by their digests, is not measured again.

    Args:
        snapshots: of a run that has trained all its stages.
        evaluator: asks the run's model.
        rows: task -> the examples to measure it on.
        progress: called before every stage.

    Returns:
        N + 1 rows of T measures. Without the configuration's `matrix`, None for all but those when
        a task was learned and at the end.
    """
    model = evaluator.injection.model
    num_stages = len(snapshots.stages)
    known: dict[tuple[int, tuple[str | None, str | None]], Items] = {}
    measured: list[list[Items | None]] = []
    for i in range(num_stages + 1):
        progress("measuring", i, num_stages + 1)
        row: list[Items | None] = []
        for t, task in enumerate(snapshots.config.tasks):
            if not snapshots.config.matrix and i not in (snapshots.learned_after(t), num_stages):
                row.append(None)
                continue
            adapters = snapshots.adapters_after(i, t)
            key = (t, adapters.digests)
            if key not in known:
                plan = adapters.plan(model.device, model.dtype)
                known[key] = evaluator.measure_items(plan, rows[task])
            row.append(known[key])
        measured.append(row)
    return measured


def read_logs(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of several step logs, one after the other."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def make_record(
    snapshots: Snapshots,
    measured: Sequence[Sequence[Items | None]],
    log: Sequence[dict[str, Any]],
    train_s: float,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The record of a finished run, without the time that the whole run took.

    Args:
        snapshots: the run's.
        measured: as `measure_stages` returns it.
        log: every step of the run, as `read_logs` returns it.
        train_s: seconds spent in training.
        dtype: the dtype that serves, in which the backbone is certified.
    """
    config, arm = snapshots.config, snapshots.arm
    loss: list[list[float | None]] = []
    accuracy: list[list[float | None]] = []
    for row in measured:
        cells = [None if items is None else Measure.of(items) for items in row]
        loss.append([None if cell is None else cell.loss for cell in cells])
        accuracy.append([None if cell is None else cell.accuracy for cell in cells])
    learned = [snapshots.learned_after(t) for t in range(len(config.tasks))]
    digests = _digests(snapshots)
    machine = hardware()
    tokens = sum(step["tokens"] for step in log)
    norm_log: dict[str, Any] = {}
    certificate: dict[str, Any] = {}
    logged = [step["crma"] for step in log if "crma" in step]
    if logged:
        norm_log = backbone_log.summarise(logged)
    if arm.crma:
        certificate = _certificate(snapshots, dtype)
    return {
        "arm": arm.name,
        "seed": config.seed,
        "order": list(config.tasks),
        "config": config.model_dump(mode="json"),
        "digests": digests,
        "loss": loss,
        "accuracy": accuracy,
        **measures(loss, accuracy, learned),
        "items": _items(config, measured, learned),
        "pairing": conditions(config, digests, dtype, machine),
        "steps": len(log),
        "norm_log": norm_log,
        "certificate": certificate,
        "training": {
            "tokens": tokens,
            "wall_s": train_s,
            "tokens_per_s": tokens / train_s,
            "recorded_steps": sum(step.get("recorded", False) for step in log),
        },
        "hardware": machine,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
    }


def _items(
    config: TrainConfig, measured: Sequence[Sequence[Items | None]], learned: Sequence[int]
) -> dict[str, Any]:
    """The loss of each measured question: when its task was learned, and at the end.

    Returns:
        Task -> {"tokens": of the answers, "learned" and "final": nats summed over them, to six
        digits}, in the order of the split's file.
    """
    found: dict[str, Any] = {}
    for t, task in enumerate(config.tasks):
        when_learned, final = measured[learned[t]][t] or [], measured[-1][t] or []
        found[task_name(task)] = {
            "tokens": [item.num_tokens for item in final],
            "learned": [float(f"{item.nats:.6g}") for item in when_learned],
            "final": [float(f"{item.nats:.6g}") for item in final],
        }
    return found


def _digests(snapshots: Snapshots) -> dict[str, Any]:
    """The identities of everything that the run read and made."""
    splits = dict.fromkeys([*SPLITS, *snapshots.config.measure.split("+")])
    stages = snapshots.stages
    backbones = []
    if snapshots.arm.crma:
        backbones = [snapshots.backbone_after(i).digest for i in range(1, len(stages) + 1)]
    return {
        "base": snapshots.base.digest,
        "data": {task: split_digests(task, splits) for task in snapshots.config.tasks},
        "tasks": {stage.name: snapshots.task(i).digest for i, stage in enumerate(stages)},
        "backbones": backbones,
    }


def _certificate(snapshots: Snapshots, dtype: torch.dtype) -> dict[str, Any]:
    """The certificate of the last backbone; its movement is counted from the first stage's."""
    first = snapshots.backbone_after(1).load()
    last = snapshots.backbone_after(len(snapshots.stages)).load()
    certificate = certify(last, first, dtype)
    return {key: value for key, value in certificate.items() if key != "layers"}
