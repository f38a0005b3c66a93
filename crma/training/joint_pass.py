"""Forward and backward passes of a joint model; on CUDA, recorded once and played again.

A pass of a small model is thousands of kernels, and launching them takes many times as long as
running them. A CUDA graph launches all of them at once. What it reads and writes lies where it lay
when it was recorded, so a batch is padded to one of a few shapes and copied there.

Shapes: n runs; b rows of each; s positions; keep the longest answer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crma.evaluation.evaluator import IGNORED, Batch
from crma.training.adapted_model import RecordingPair
from crma.training.joint_model import JointFold, JointModel

WARM_UPS = 2  # passes before one is recorded: libraries allocate and choose kernels in the first
POSITIONS = 16  # batches of a graph have a multiple of so many positions
ANSWER_TOKENS = 4  # and their answers a multiple of so many tokens


class Passed(NamedTuple):
    """What a pass computes.

    Attributes:
        losses: [n] the mean loss of each run's batch, per answer token.
        lora: the gradients of `JointModel.trained_lora`, each of its own run's loss.
        fold: those of the parts of the fold that require one.
    """

    losses: Tensor
    lora: tuple[Tensor, ...]
    fold: tuple[Tensor, ...]


Pass = Callable[[Batch, Tensor, JointFold | None], Passed]
"""Given a batch, the answer tokens of each run [n], and the folded backbones."""


def pass_of(model: JointModel) -> Pass:
    """What does the passes of a model where it is."""
    if model.injection.model.device.type == "cuda":
        return RecordedPasses(model)
    return DirectPass(model)


class DirectPass:
    """Does each pass as it comes."""

    def __init__(self, model: JointModel) -> None:
        self.model = model

    def __call__(self, batch: Batch, num_tokens: Tensor, fold: JointFold | None) -> Passed:
        """Do a pass. Nothing is added to any `grad`."""
        leaves = None if fold is None else JointFold(*(_leaf(part) for part in fold))
        lora = self.model.trained_lora
        inputs = [*lora, *(part for part in leaves or () if part.requires_grad)]
        losses = self.model.losses(batch, leaves) / num_tokens
        gradients = torch.autograd.grad(losses.sum(), inputs)
        return Passed(losses.detach(), gradients[: len(lora)], gradients[len(lora) :])


def _leaf(part: Tensor) -> Tensor:
    """The same numbers without their past."""
    return part.detach().requires_grad_(part.requires_grad)


class Recorded(NamedTuple):
    """A recorded pass.

    Attributes:
        graph: plays it.
        inputs: where it reads the batch, the answer tokens and the folded backbones.
        passed: where it writes.
        recording: the folded pairs, whose ratios it writes.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Batch, Tensor, JointFold | None]
    passed: Passed
    recording: list[RecordingPair]


class RecordedPasses:
    """Records a pass for every shape of batch, and plays it for those that follow.

    What a pass returns is overwritten by the next one.
    """

    def __init__(self, model: JointModel) -> None:
        self.model = model
        self.direct = DirectPass(model)
        self.recorded: dict[tuple[torch.Size, torch.Size], Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()
        # One for all shapes: each stream keeps memory and a workspace of cuBLAS of its own.
        self.beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch, num_tokens: Tensor, fold: JointFold | None) -> Passed:
        """Do a pass. Nothing is added to any `grad`."""
        batch = padded(batch)
        shape = (batch.input_ids.shape, batch.targets.shape)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(batch, num_tokens, fold)
        found = self.recorded[shape]
        into, num_into, fold_into = found.inputs
        pairs = [*zip(into, batch, strict=True), (num_into, num_tokens)]
        pairs += zip(fold_into or (), fold or (), strict=True)
        for place, value in pairs:
            place.detach().copy_(value.detach())
        found.graph.replay()
        self.model.recording = found.recording
        return found.passed

    def _record(self, batch: Batch, num_tokens: Tensor, fold: JointFold | None) -> Recorded:
        kept = None if fold is None else JointFold(*(_leaf(part.clone()) for part in fold))
        inputs = (Batch(*(each.clone() for each in batch)), num_tokens.clone(), kept)
        self.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.beside):
            for _ in range(WARM_UPS):
                self.direct(*inputs)
        torch.cuda.current_stream().wait_stream(self.beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            passed = self.direct(*inputs)
        return Recorded(graph, inputs, passed, list(self.model.recording))


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
