"""crma.training.joint_pass: batches in few shapes. Recorded passes: tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from crma.evaluation.evaluator import IGNORED, Encoded, collate
from crma.training.joint_model import JointModel
from crma.training.joint_pass import ANSWER_TOKENS, POSITIONS, DirectPass, padded

if TYPE_CHECKING:
    from crma.training.protocol import Run

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh")
"""What the CPU waits for, or brings to the device: CUDA records none of it."""

ROWS = [Encoded([5, 6, 7], [8, 9]), Encoded([5, 4], [3, 9, 1, 2, 7, 9])]


def test_few_shapes_occur() -> None:
    shapes = set()
    for length in range(1, 40):
        batch = padded(collate([Encoded([5] * length, [7] * answer) for answer in (1, 5)], 0))
        assert batch.input_ids.shape == batch.attention_mask.shape
        shapes.add((batch.input_ids.shape[1], batch.targets.shape[1]))
    assert shapes == {(POSITIONS * i, 2 * ANSWER_TOKENS) for i in (1, 2, 3)}


def test_an_answer_is_never_longer_than_what_is_read() -> None:
    batch = padded(collate([Encoded([5], [7] * 15)], 0))
    assert batch.input_ids.shape[1] >= batch.targets.shape[1] == 16


@pytest.mark.parametrize("arm", ["FROZEN", "MODULAR"])
def test_a_padded_batch_has_the_same_losses_and_gradients(
    make: Callable[..., Run], tmp_path: Path, arm: str
) -> None:
    run = make(tmp_path, arm)
    (trainer,) = next(run.training())
    model = JointModel([trainer.adapted, trainer.adapted])
    batch = collate(ROWS, run.evaluator.stop_id)
    num_tokens = torch.tensor([2.0, 6.0])
    direct = DirectPass(model)
    found = direct(padded(batch), num_tokens, model.joint_fold())
    wanted = direct(batch, num_tokens, model.joint_fold())
    assert (padded(batch).targets != IGNORED).sum() == 8
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.lora, wanted.lora, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.fold, wanted.fold, rtol=1e-3, atol=1e-6)
    assert len(found.fold) == (0 if arm == "FROZEN" else 2)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes all operations, with the shapes that they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_map(_shape, (args, kwargs))
        self.noted.append((func.name(), repr(given)))
        return func(*args, **kwargs or {})


def _shape(value: object) -> object:
    return value.shape if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("arm", ["FROZEN", "MODULAR"])
def test_a_pass_does_the_same_whatever_a_batch_holds(
    make: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """Otherwise CUDA could not record it. `transformers` asks whether it does."""
    run = make(tmp_path, arm)
    run.model.set_attn_implementation("sdpa")
    (trainer,) = next(run.training())
    model = JointModel([trainer.adapted, trainer.adapted])
    fold, num_tokens = model.joint_fold(), torch.tensor([1.0, 1.0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    noted = []
    for length in (16, 3):  # without padding, and with much
        batch = padded(collate([Encoded([5] * length, [8]), Encoded([4] * length, [7])], 0))
        with Operations() as operations:
            DirectPass(model)(batch, num_tokens, fold)
        noted.append(operations.noted)
    assert noted[0] == noted[1]
    names = {name.partition(".")[0] for name, _ in noted[0]}
    assert "aten::bmm" in names
    assert not names.intersection(READS)
