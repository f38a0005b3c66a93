"""crma.training.joint_pass: batches in few shapes. Recorded passes: tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from crma.evaluation.evaluator import IGNORED, Encoded, collate
from crma.training.joint_model import JointModel
from crma.training.joint_pass import ANSWER_TOKENS, POSITIONS, DirectPass, padded

if TYPE_CHECKING:
    from crma.training.protocol import Run

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
