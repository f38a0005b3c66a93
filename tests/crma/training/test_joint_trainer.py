"""crma.training.joint_trainer: runs that train at once get what each gets alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from crma.core.errors import TrainingError
from crma.training.joint_trainer import JointTrainer, train_together
from crma.training.protocol import Run
from crma.training.recorded_pass import Recorder
from crma.training.training_model import load_training_model

if TYPE_CHECKING:
    from crma.models.base_model import BaseModel

JOINT_ARMS = (
    "FROZEN-warm-mean",
    "O-LoRA",
    "M=I",
    "SLOW-FAST_free-M",
    "NULL-SPACE",
    "PRIVATE",
    "ORACLE-loo",
)
SETTINGS = {"batch_size": 5, "ema": 0.8, "clip": 0.5}  # batches of 5, 5 and 2
SEEDS = (0, 1)


def together(runs: list[Run]) -> list[dict[str, Any]]:
    return train_together([run.training(at_once=True) for run in runs])


@pytest.fixture
def pair(make: Callable[..., Run], base: BaseModel, tmp_path: Path) -> Callable[..., list[Run]]:
    """Makes two runs of an arm on one model; the second has another order of tasks."""

    def pair(folder: str, arm: str, **changes: Any) -> list[Run]:
        loaded = load_training_model(base, "float32")
        return [
            make(
                tmp_path / folder / str(seed),
                arm,
                tasks=("second", "first") if seed == 1 else ("first", "second"),
                seed=seed,
                loaded=loaded,
                **SETTINGS | changes,
            )
            for seed in SEEDS
        ]

    return pair


def log(run: Run) -> list[dict[str, Any]]:
    """The step log. Without `dh`, which counts the padding of a batch, too."""
    files = list(run.stage_trainer.logs())
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for line in lines:
        line.get("crma", {}).pop("dh", None)
    return lines


def assert_close(found: Any, wanted: Any) -> None:
    """Numbers to a relative 1e-3, as deep as they lie; all else is equal."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_close(found[key], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-3, abs=2e-5)
    else:
        assert found == wanted


@pytest.mark.parametrize("arm", JOINT_ARMS)
def test_each_run_gets_what_it_gets_alone(pair: Callable[..., list[Run]], arm: str) -> None:
    alone = pair("alone", arm)
    joint = pair("joint", arm)
    wanted = [run.execute() for run in alone]
    found = together(joint)
    for ours, theirs in zip(found, wanted, strict=True):
        for key in ("seed", "order", "loss", "loss_unaveraged", "items", "steps", "norm_log"):
            assert_close(ours[key], theirs[key])
    for ours, theirs in zip(joint, alone, strict=True):
        assert_close(log(ours), log(theirs))


def test_an_error_names_the_run_that_failed(pair: Callable[..., list[Run]]) -> None:
    good, bad = trainers = [next(run.training())[0] for run in pair("broken", "FROZEN")]
    with torch.no_grad():
        bad.adapted.lora_parameters[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite") as caught:
        JointTrainer(trainers, Recorder()).run()
    assert str(bad.folder) in caught.value.message
    assert str(good.folder) not in caught.value.message
