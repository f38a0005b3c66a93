"""crma.training.joint_pass: batches in few shapes, and passes that a CUDA graph can do again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from crma.evaluation.evaluator import IGNORED, Batch, Encoded, collate
from crma.training.joint_model import JointModel, joined
from crma.training.joint_pass import ANSWER_TOKENS, POSITIONS, DirectPass, Inputs, padded

if TYPE_CHECKING:
    from crma.training.protocol import Run

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh")
"""What the CPU waits for, or brings to the device: CUDA records none of it."""

ROWS = [Encoded([5, 6, 7], [8, 9]), Encoded([5, 4], [3, 9, 1, 2, 7, 9])]


def inputs_of(model: JointModel, batch: Batch) -> Inputs:
    """What a pass of a model reads, with its weights as they are."""
    num_tokens = torch.tensor([2.0, 6.0], device=batch.targets.device)
    lora = joined(model.trained_lora, model.num_runs)
    return Inputs(batch, num_tokens, lora, model.joint_fold())


@pytest.fixture
def joint(make: Callable[..., Run], tmp_path: Path) -> Callable[[str], JointModel]:
    """Makes the model of two runs of an arm in its first stage."""

    def joint(arm: str) -> JointModel:
        (trainer,) = next(make(tmp_path / arm, arm).training())
        return JointModel([trainer.adapted, trainer.adapted])

    return joint


def test_few_shapes_occur() -> None:
    shapes = set()
    for length in range(1, 40):
        batch = padded(collate([Encoded([5] * length, [7] * answer) for answer in (1, 5)], 0))
        assert batch.input_ids.shape == batch.attention_mask.shape
        shapes.add((batch.input_ids.shape[1], batch.targets.shape[1]))
    assert shapes == {(POSITIONS * i, ANSWER_TOKENS) for i in (1, 2, 3)}


def test_an_answer_is_never_longer_than_what_is_read() -> None:
    batch = padded(collate([Encoded([5], [7] * 15)], 0))
    assert batch.input_ids.shape[1] >= batch.targets.shape[1] == 16


@pytest.mark.parametrize("arm", ["FROZEN", "MODULAR"])
def test_a_padded_batch_has_the_same_losses_and_gradients(
    joint: Callable[[str], JointModel], arm: str
) -> None:
    model = joint(arm)
    batch = collate(ROWS, 0)
    direct = DirectPass(model)
    found = direct(inputs_of(model, padded(batch)))
    wanted = direct(inputs_of(model, batch))
    assert (padded(batch).targets != IGNORED).sum() == 8
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.lora, wanted.lora, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.fold, wanted.fold, rtol=1e-3, atol=1e-6)
    assert len(found.fold) == (0 if arm == "FROZEN" else 2)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes all operations, the shapes that they are given, and the devices of all tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[tuple[str, str]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        self.noted.append((func.name(), repr(tree_map(_shape, given))))
        result = func(*args, **kwargs or {})
        tensors = [x for x in tree_flatten((given, result))[0] if isinstance(x, torch.Tensor)]
        self.devices |= {tensor.device.type for tensor in tensors}
        return result


def _shape(value: object) -> object:
    return value.shape if isinstance(value, torch.Tensor) else value


@pytest.fixture
def as_if_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` asks whether CUDA records."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.usefixtures("as_if_recording")
@pytest.mark.parametrize("arm", ["FROZEN", "MODULAR"])
def test_a_pass_does_the_same_whatever_a_batch_holds(
    joint: Callable[[str], JointModel], arm: str
) -> None:
    """Otherwise CUDA could not record it."""
    model = joint(arm)
    model.injection.model.set_attn_implementation("sdpa")
    noted = []
    for length in (16, 3):  # without padding, and with much
        batch = padded(collate([Encoded([5] * length, [8]), Encoded([4] * length, [7])], 0))
        inputs = inputs_of(model, batch)
        with Operations() as operations:
            DirectPass(model)(inputs)
        noted.append(operations.noted)
    assert noted[0] == noted[1]
    names = {name.partition(".")[0] for name, _ in noted[0]}
    assert "aten::bmm" in names
    assert not names.intersection(READS)


@pytest.mark.usefixtures("as_if_recording")
@pytest.mark.parametrize("arm", ["FROZEN", "MODULAR"])
def test_a_pass_brings_nothing_from_another_device(
    joint: Callable[[str], JointModel], arm: str
) -> None:
    """CUDA records no copy from memory that is not pinned. "meta" stands for a GPU."""
    model = joint(arm)
    model.injection.model.set_attn_implementation("sdpa")
    inputs = tree_map_only(torch.Tensor, _on_meta, inputs_of(model, padded(collate(ROWS, 0))))
    model.injection.model.to("meta")
    model.to("meta")
    with Operations() as operations:
        DirectPass(model)(inputs)
    assert operations.devices == {"meta"}


@pytest.mark.parametrize("arm", ["FROZEN", "MODULAR"])
def test_a_pass_differentiates_leaves_of_its_own(
    joint: Callable[[str], JointModel], monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """The node of a parameter has the stream of the pass that made it: a recording fails there."""
    model = joint(arm)
    leaves: list[torch.Tensor] = []
    differentiate = torch.autograd.grad

    def grad(objective: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves.extend(_leaves(objective.grad_fn, set()))
        return differentiate(objective, inputs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    DirectPass(model)(inputs_of(model, collate(ROWS, 0)))
    assert len(leaves) == (1 if arm == "FROZEN" else 3)
    assert not any(leaf is each for leaf in leaves for each in model.parameters())
    assert model.recording == []  # it would keep the graph of autograd


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _leaves(node: Any, seen: set[Any]) -> list[torch.Tensor]:
    if node is None or node in seen:
        return []
    seen.add(node)
    found = [node.variable] if hasattr(node, "variable") else []
    for before, _ in node.next_functions:
        found += _leaves(before, seen)
    return found
