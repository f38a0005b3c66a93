"""The forward and backward pass of a joint model, as it comes.

`recorded_pass` does the same as a CUDA graph, which has rules (docs/decisions/0082). So all that
changes from pass to pass is an argument here, and nothing waits for the device.

Shapes: n runs; p values of the LoRAs that train in one run; b rows of each run; s positions; keep
the longest answer; L layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crma.evaluation.evaluator import IGNORED, Batch
from crma.training.joint_model import JointFold, JointModel, parted

POSITIONS = 16  # a padded batch has a multiple of so many positions
ANSWER_TOKENS = 8  # and its answers a multiple of so many tokens


class Inputs(NamedTuple):
    """What a pass reads that changes from step to step.

    Attributes:
        batch: the rows of all runs.
        num_tokens: [n] the answer tokens of each run's rows, as float.
        lora: [n, p] the values of `JointModel.trained_lora`, `joined`.
        fold: the folded backbones; None without any. Parts that require a gradient get one.
    """

    batch: Batch
    num_tokens: Tensor
    lora: Tensor
    fold: JointFold | None

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [*self.batch, self.num_tokens, self.lora, *(self.fold or ())]


class Passed(NamedTuple):
    """What a pass computes.

    Attributes:
        losses: [n] the mean loss of each run's batch, per answer token.
        lora: [n, p] the gradients of the LoRAs, each of its own run's objective.
        fold: those of the parts of the fold that require one.
        ratios: as `JointModel.ratios`.
        recorded: whether the pass was played from a recording.
    """

    losses: Tensor
    lora: Tensor
    fold: tuple[Tensor, ...]
    ratios: Tensor
    recorded: bool = False

    def tensors(self) -> list[Tensor]:
        """All tensors of it, in order."""
        return [self.losses, self.lora, *self.fold, self.ratios]


Pass = Callable[[Inputs], Passed]


class DirectPass:
    """Does each pass as it comes.

    What a pass differentiates are leaves of its own. So no pass finds a node of an earlier one, on
    whose stream autograd would wait: that breaks a recording.
    """

    def __init__(self, model: JointModel) -> None:
        self.model = model

    def __call__(self, inputs: Inputs) -> Passed:
        """Do a pass. Nothing is added to any `grad`."""
        model = self.model
        lora = inputs.lora.detach().requires_grad_()
        fold = None if inputs.fold is None else JointFold(*map(_leaf, inputs.fold))
        # Cast at once, and not tensor by tensor: a tenth of all operations would do that.
        cast = parted(lora.to(model.injection.model.dtype), model.trained_lora)
        losses = model.losses(inputs.batch, model.lora_with(cast), fold) / inputs.num_tokens
        objective = losses.sum()
        if model.penalty is not None:
            exact = model.lora_with(parted(lora, model.trained_lora))
            objective = objective + model.penalty(exact).sum()
        trained = [part for part in fold or () if part.requires_grad]
        if lora.numel() == 0:
            gradients = (lora.detach(), *torch.autograd.grad(objective, trained))
        else:
            gradients = torch.autograd.grad(objective, [lora, *trained])
        ratios = model.ratios
        model.recording = []  # it holds on to the graph of autograd
        return Passed(losses.detach(), gradients[0], gradients[1:], ratios)


def _leaf(part: Tensor) -> Tensor:
    """The same numbers without their past."""
    return part.detach().requires_grad_(part.requires_grad)


def padded(batch: Batch) -> Batch:
    """The batch with so many more columns on the left that few shapes occur."""
    wanted = -batch.input_ids.shape[1] % POSITIONS
    more_answer = -batch.targets.shape[1] % ANSWER_TOKENS
    # A column of targets belongs to one of the inputs.
    wanted += POSITIONS * (batch.targets.shape[1] + more_answer > batch.input_ids.shape[1] + wanted)
    on_the_left = nn.functional.pad
    return Batch(
        on_the_left(batch.input_ids, (wanted, 0)),
        on_the_left(batch.attention_mask, (wanted, 0)),
        on_the_left(batch.targets, (more_answer, 0), value=IGNORED),
    )
