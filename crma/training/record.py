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
from crma.evaluation.evaluator import Encoded, Evaluator, Measure
from crma.method.certificate import certify
from crma.training import backbone_log
from crma.training.drift import measures
from crma.training.snapshots import Snapshots, split_digests

Progress = Callable[[str, int, int], None]  # (description, done, total)


def measure_stages(
    snapshots: Snapshots,
    evaluator: Evaluator,
    rows: Mapping[str, list[Encoded]],
    progress: Progress,
) -> list[list[Measure]]:
    """Measure every task after every stage, from the published snapshots.

    Args:
        snapshots: of a run that has trained all its stages.
        evaluator: asks the run's model.
        rows: task -> the examples to measure it on.
        progress: called before every stage.

    Returns:
        N + 1 rows of T measures.
    """
    model = evaluator.injection.model
    num_stages = len(snapshots.stages)
    measured: list[list[Measure]] = []
    for i in range(num_stages + 1):
        progress("measuring", i, num_stages + 1)
        row = []
        for t, task in enumerate(snapshots.config.tasks):
            plan = snapshots.plan_after(i, t, model.device, model.dtype)
            is_base_model = not plan.tasks and not plan.backbones
            if i > 0 and is_base_model:
                row.append(measured[0][t])
            else:
                row.append(evaluator.measure(plan, rows[task]))
        measured.append(row)
    return measured


def read_logs(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of several step logs, one after the other."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def make_record(
    snapshots: Snapshots,
    measured: Sequence[Sequence[Measure]],
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
    loss: list[list[float]] = []
    accuracy: list[list[float]] = []
    for row in measured:
        loss.append([measure.loss for measure in row])
        accuracy.append([measure.accuracy for measure in row])
    learned = [snapshots.learned_after(t) for t in range(len(config.tasks))]
    tokens = sum(step["tokens"] for step in log)
    norm_log: dict[str, Any] = {}
    certificate: dict[str, Any] = {}
    if arm.crma:
        norm_log = backbone_log.summarise([step["crma"] for step in log if "crma" in step])
        certificate = _certificate(snapshots, dtype)
    return {
        "arm": arm.name,
        "seed": config.seed,
        "order": list(config.tasks),
        "config": config.model_dump(mode="json"),
        "digests": _digests(snapshots),
        "loss": loss,
        "accuracy": accuracy,
        **measures(loss, accuracy, learned),
        "steps": len(log),
        "norm_log": norm_log,
        "certificate": certificate,
        "training": {"tokens": tokens, "wall_s": train_s, "tokens_per_s": tokens / train_s},
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
    }


def _digests(snapshots: Snapshots) -> dict[str, Any]:
    """The identities of everything that the run read and made."""
    stages = snapshots.stages
    backbones = []
    if snapshots.arm.crma:
        backbones = [snapshots.backbone_after(i).digest for i in range(1, len(stages) + 1)]
    return {
        "base": snapshots.base.digest,
        "data": {task: split_digests(task) for task in snapshots.config.tasks},
        "tasks": {stage.name: snapshots.task(i).digest for i, stage in enumerate(stages)},
        "backbones": backbones,
    }


def _certificate(snapshots: Snapshots, dtype: torch.dtype) -> dict[str, Any]:
    """The certificate of the last backbone; its movement is counted from the first stage's."""
    first = snapshots.backbone_after(1).load()
    last = snapshots.backbone_after(len(snapshots.stages)).load()
    certificate = certify(last, first, dtype)
    return {key: value for key, value in certificate.items() if key != "layers"}
