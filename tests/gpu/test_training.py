"""Training on a CUDA device, and what it records there: `scripts/gpu_study.sh` runs this first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from crma.evaluation.evaluator import Batch, Encoded, collate
from crma.training import protocol, training_model
from crma.training.config import TrainConfig
from crma.training.cuda_tape import CudaTape
from crma.training.joint_model import JointModel, joined
from crma.training.joint_pass import DirectPass, Inputs
from crma.training.joint_trainer import train_together
from crma.training.recorded_pass import Recorder

if TYPE_CHECKING:
    from crma.models.base_model import BaseModel

pytestmark = pytest.mark.gpu


@pytest.fixture
def run_values(
    write_task: Callable[[Path, tuple[str, str]], None], tmp_path: Path
) -> dict[str, Any]:
    """The configuration of a run of two small tasks."""
    write_task(tmp_path / "data" / "first", ("yes", "no"))
    write_task(tmp_path / "data" / "second", ("left", "right"))
    return {
        "tasks": [str(tmp_path / "data" / task) for task in ("first", "second")],
        "epochs": 2,
        "batch_size": 2,
        "dtype": "float32",
        "lora": {"rank": 2, "alpha": 4.0},
        "crma": {"num_streams": 2, "stream_rank": 2, "later_scale": 0.5},
    }


def test_a_run_on_the_device_trains_what_it_trains_on_the_cpu(
    device: torch.device,
    base: BaseModel,
    run_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = []
    for place in (torch.device("cpu"), device):
        monkeypatch.setattr(training_model, "resolve_device", lambda _, place=place: place)
        out = tmp_path / f"run-{len(losses)}"
        record = protocol.Run(TrainConfig.from_dict(run_values), base, out, _ignore).execute()
        losses.append([loss for row in record["loss"] for loss in row])
    on_cpu, on_device = losses
    assert on_device == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize(
    "arm", ["FROZEN-warm-mean", "MODULAR", "NULL-SPACE", "ORACLE-loo", "SLOW-FAST", "O-LoRA"]
)
def test_runs_that_train_at_once_on_the_device_get_what_each_gets_alone(
    device: torch.device,
    base: BaseModel,
    run_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arm: str,
) -> None:
    """There, passes are recorded and played again."""
    monkeypatch.setattr(training_model, "resolve_device", lambda _: device)
    loaded = training_model.load_training_model(base, "float32")

    def run(folder: str, seed: int) -> protocol.Run:
        config = TrainConfig.from_dict(run_values | {"arm": arm, "seed": seed})
        return protocol.Run(config, base, tmp_path / folder / str(seed), _ignore, loaded)

    recorder = Recorder(CudaTape() if device.type == "cuda" else None)
    trainings = [run("joint", seed).training(at_once=True) for seed in range(3)]
    for seed, record in enumerate(train_together(trainings, recorder)):
        alone = run("alone", seed).execute()
        losses, wanted = ([x for row in each["loss"] for x in row] for each in (record, alone))
        assert losses == pytest.approx(wanted, rel=1e-3)
        was_recorded = record["training"]["recorded_steps"] > 0.5 * record["steps"]
        assert was_recorded == (device.type == "cuda")
    assert not recorder.failed


def test_where_rows_are_padded_gradients_are_finite(
    device: torch.device,
    base: BaseModel,
    run_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuDNN's attention has NaN there at 64 positions."""
    monkeypatch.setattr(training_model, "resolve_device", lambda _: device)
    loaded = training_model.load_training_model(base, "bfloat16")
    config = TrainConfig.from_dict(run_values | {"dtype": "bfloat16"})
    (trainer,) = next(protocol.Run(config, base, tmp_path / "run", _ignore, loaded).training())
    model = JointModel([trainer.adapted])
    rows = [Encoded([5] * 64, [7]), Encoded([6, 8], [9])]
    batch = Batch(*(each.to(device) for each in collate(rows, 0)))
    lora = joined(model.trained_lora, 1)
    inputs = Inputs(batch, torch.tensor([2.0], device=device), lora, model.joint_fold())
    passed = DirectPass(model)(inputs)
    assert all(tensor.isfinite().all() for tensor in passed.tensors())


def test_what_was_recorded_reads_and_writes_where_it_did(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA records")
    tape = CudaTape()
    places = [torch.zeros(8, device=device) for _ in range(2)]
    sums = [torch.zeros((), device=device) for _ in range(2)]

    def add_up(index: int) -> None:
        sums[index].copy_((places[index] * 2).sum())

    for factor in (1, 2):
        play = []
        for index in range(2):
            tape.warm_up(partial(add_up, index))
            play.append(tape.record(partial(add_up, index)))
        for index in (1, 0, 1):
            places[index].fill_(factor * (index + 1))
            play[index]()
        assert [each.item() for each in sums] == [16 * factor, 32 * factor]
        del play
        tape.forget()  # the next ones are recorded anew


def test_a_recording_that_fails_leaves_the_device_as_it_was(device: torch.device) -> None:
    """The last test: where that is not so, no later one can record."""
    if device.type != "cuda":
        pytest.skip("only CUDA records")
    tape = CudaTape()
    numbers = torch.ones(1000, device=device)

    def reads() -> None:
        (numbers * 2).sum().item()

    tape.warm_up(reads)
    with pytest.raises(RuntimeError):
        tape.record(reads)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert (numbers * 2).sum().item() == 2000


def _ignore(*_: object) -> None:
    """Take no part in the progress of a run."""
