"""crma.training.recorded_pass: what is recorded, when, and what happens where it cannot be.

A tape that does its work again stands for CUDA, which tests/gpu has. Like CUDA, it reads and writes
where it read and wrote when it recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from crma.evaluation.evaluator import Encoded, collate
from crma.training.cuda_tape import Play
from crma.training.joint_model import JointModel, joined
from crma.training.joint_pass import DirectPass, Inputs, Passed, padded
from crma.training.joint_trainer import train_together
from crma.training.recorded_pass import Recorder
from crma.training.training_model import load_training_model

if TYPE_CHECKING:
    from crma.models.base_model import BaseModel
    from crma.training.protocol import Run

SHORT, LONG = 5, 20  # tokens of a prompt: two shapes of batches
SEEDS = (0, 1)


class Again:
    """A tape that does its work again."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_forgotten = 0

    def warm_up(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], None]) -> Play:
        self.num_recorded += 1
        work()
        return work

    def forget(self) -> None:
        self.num_forgotten += 1


class Refuses(Again):
    """A tape that records nothing."""

    def record(self, work: Callable[[], None]) -> Play:
        super().record(work)
        raise RuntimeError("operation not permitted when stream is capturing")


class Forgets(Again):
    """A tape that plays nothing."""

    def record(self, work: Callable[[], None]) -> Play:
        self.num_recorded += 1
        return lambda: None


@pytest.fixture
def runs(make: Callable[..., Run], base: BaseModel, tmp_path: Path) -> Callable[..., list[Run]]:
    """Makes two runs of an arm on one model."""
    loaded = load_training_model(base, "float32")

    def runs(folder: str, arm: str, **changes: Any) -> list[Run]:
        return [
            make(tmp_path / folder / str(seed), arm, seed=seed, loaded=loaded, **changes)
            for seed in SEEDS
        ]

    return runs


@pytest.fixture
def joint(runs: Callable[..., list[Run]]) -> Callable[..., JointModel]:
    """Makes the joint model of two runs of an arm in their first stage."""

    def joint(folder: str, arm: str, **changes: Any) -> JointModel:
        trainers = [next(run.training())[0] for run in runs(folder, arm, **changes)]
        model = JointModel([trainer.adapted for trainer in trainers])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return joint


def inputs_of(model: JointModel, length: int, token: int) -> Inputs:
    """What a pass reads: a padded batch, and the weights of the model."""
    batch = padded(collate([Encoded([token] * length, [8]), Encoded([4, token], [7, 3])], 0))
    lora = joined(model.trained_lora, model.num_runs)
    return Inputs(batch, torch.tensor([1.0, 2.0]), lora, model.joint_fold())


def assert_as_it_comes(model: JointModel, found: Passed, inputs: Inputs) -> None:
    wanted = DirectPass(model)(inputs)
    torch.testing.assert_close(found.tensors(), wanted.tensors(), rtol=0, atol=0)


@pytest.mark.parametrize("arm", ["FROZEN", "MODULAR"])
def test_from_its_second_pass_on_a_shape_is_played_with_what_is_new(
    joint: Callable[..., JointModel], arm: str
) -> None:
    tape = Again()
    model = joint("own", arm)
    do_pass = Recorder(tape).pass_of(model)
    played = []
    for step, length in enumerate([SHORT, LONG, SHORT, SHORT, LONG, SHORT, LONG]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        inputs = inputs_of(model, length, step + 10)
        found = do_pass(inputs)
        assert_as_it_comes(model, found, inputs)
        played.append(found.recorded)
    assert played == [False, False, True, True, True, True, True]
    assert tape.num_recorded == 2


def test_models_of_a_kind_share_what_was_recorded(joint: Callable[..., JointModel]) -> None:
    """What does not train is part of the model, not of what a pass is given."""
    tape = Again()
    recorder = Recorder(tape)
    for name in ("one", "other"):
        model = joint(name, "FROZEN")
        for path in sorted(model.lora.pairs):
            model.lora.pairs[path].A.requires_grad_(requires_grad=False)
        do_pass = recorder.pass_of(model)
        for step in range(3):
            inputs = inputs_of(model, SHORT, step + 10)
            assert_as_it_comes(model, do_pass(inputs), inputs)
    assert tape.num_recorded == 1
    recorder.forget()
    assert tape.num_forgotten == 1
    do_pass = recorder.pass_of(model)
    assert [do_pass(inputs).recorded for _ in range(2)] == [False, True]


def test_models_that_differ_in_a_constant_share_nothing(joint: Callable[..., JointModel]) -> None:
    tape = Again()
    recorder = Recorder(tape)
    for alpha in (4.0, 8.0):
        model = joint(str(alpha), "FROZEN", lora={"alpha": alpha})
        do_pass = recorder.pass_of(model)
        for step in range(3):
            inputs = inputs_of(model, SHORT, step + 10)
            assert_as_it_comes(model, do_pass(inputs), inputs)
    assert tape.num_recorded == 2


@pytest.mark.parametrize(
    ("tape", "said"),
    [(Refuses(), "could not be recorded .operation not permitted"), (Forgets(), "pass is wrong")],
)
def test_where_nothing_can_be_recorded_passes_are_done_as_they_come(
    joint: Callable[..., JointModel], tape: Again, said: str
) -> None:
    recorder = Recorder(tape)
    model = joint("own", "MODULAR")
    do_pass = recorder.pass_of(model)
    inputs = inputs_of(model, SHORT, 10)
    assert_as_it_comes(model, do_pass(inputs), inputs)
    with pytest.warns(RuntimeWarning, match=said):
        found = do_pass(inputs)
    for again in (found, do_pass(inputs), recorder.pass_of(model)(inputs)):  # without a warning
        assert not again.recorded
        assert_as_it_comes(model, again, inputs)
    assert recorder.failed
    assert tape.num_recorded == 1


@pytest.mark.parametrize("arm", ["MODULAR", "FROZEN-warm-mean", "ORACLE", "O-LoRA"])
def test_runs_whose_passes_are_played_get_what_they_get_as_passes_come(
    runs: Callable[..., list[Run]], arm: str
) -> None:
    plain = train_together([run.training(at_once=True) for run in runs("plain", arm)])
    recorder = Recorder(Again())
    played = train_together([run.training(at_once=True) for run in runs("played", arm)], recorder)
    for one, other in zip(plain, played, strict=True):
        found, wanted = (list(chain(*record["loss"])) for record in (other, one))
        assert found == pytest.approx(wanted, rel=1e-4)
        assert one["training"]["recorded_steps"] == 0
        assert other["training"]["recorded_steps"] > 0.7 * other["steps"]
    assert not recorder.failed
