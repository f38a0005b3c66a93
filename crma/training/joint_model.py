"""The frozen base model with the adapters of several runs, which read one batch together.

Shapes: n runs; b rows of each in a batch, those of the first run first; s positions; d hidden size;
r rank; L layers; nk the rank of a folded backbone. The parameters of the runs are stacked: a LoRA
pair is A [n, r, in], B [n, out, r], and a backbone is one of n L layers, those of the first run
first.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crma.evaluation.evaluator import IGNORED, Batch, last_logits
from crma.method.backbone import Backbone
from crma.method.injection import Plan
from crma.method.lora import Lora, LoraPair
from crma.training.adapted_model import AdaptedModel, RecordingPair


class JointLoraPair(LoraPair):
    """A pair of every run: A [n, r, in], B [n, out, r]."""

    def delta(self, x: Tensor) -> Tensor:
        """[n b, s, in] -> [n b, s, out]: the rows of each run get its own update."""
        low_rank = _of_each_run(x, self.A.to(x.dtype))
        return _of_each_run(low_rank * self.scaling, self.B.to(x.dtype))


class JointRecordingPair(RecordingPair):
    """A layer's folded pair of every run: A [n, nk, d], B [n, d, nk]. `ratio` is [n]."""

    def delta(self, h: Tensor) -> Tensor:
        """[n b, s, d] -> [n b, s, d], differentiable in the pair."""
        dh = _of_each_run(_of_each_run(h, self.A), self.B)
        with torch.no_grad():
            self.ratio = self._norms(dh) / self._norms(h)
        return dh

    def _norms(self, h: Tensor) -> Tensor:
        return h.view(len(self.A), -1).float().norm(dim=1)


class JointFold(NamedTuple):
    """The folded pairs of all layers of all runs, in the model's dtype."""

    A: Tensor  # [n, L, nk, d]
    B: Tensor  # [n, L, d, nk]


class JointModel(AdaptedModel):
    """The frozen base model with the adapters of several runs, one next to the other.

    Args:
        runs: the model of each run on its own, all of one shape on one injection. Their adapters
            are copied.
        penalty: what the LoRAs add to the objective of each run, [n]; None: nothing.
    """

    def __init__(
        self, runs: Sequence[AdaptedModel], penalty: Callable[[Lora], Tensor] | None = None
    ) -> None:
        first = runs[0]
        lora = _joint_lora([run.lora for run in runs])
        backbone = _joint_backbone([run.backbone for run in runs if run.backbone is not None])
        super().__init__(first.injection, lora, backbone, backbone_moves=first.backbone_moves)
        self.num_runs = len(runs)
        self.penalty = penalty

    def joint_fold(self) -> JointFold | None:
        """The folded backbones, differentiable if they train; None without any."""
        if self.backbone is None:
            return None
        dtype = self.injection.model.dtype
        with torch.set_grad_enabled(self.backbone_moves):
            A, B = self.backbone.fold()
            by_run = (self.num_runs, -1)
            return JointFold(
                A.to(dtype).view(*by_run, *A.shape[1:]), B.to(dtype).view(*by_run, *B.shape[1:])
            )

    def lora_with(self, trained: Sequence[Tensor]) -> Lora:
        """The LoRAs with other tensors in place of `trained_lora`."""
        rest = iter(trained)

        def instead(own: Tensor) -> Tensor:
            return next(rest) if own.requires_grad else own

        pairs: dict[str, LoraPair] = {}
        for path, pair in sorted(self.lora.pairs.items()):  # as `Lora.parameters` orders them
            A = instead(pair.A)
            pairs[path] = replace(pair, A=A, B=instead(pair.B))
        return Lora(self.lora.config, pairs)

    def losses(self, batch: Batch, lora: Lora, fold: JointFold | None) -> Tensor:
        """The summed loss of the answer tokens of each run, in nats: [n].

        No shape depends on what the batch holds, so that a CUDA graph can do it again.

        Args:
            batch: the rows of all runs.
            lora: as `lora_with` returns it.
            fold: as `joint_fold` returns it.
        """
        backbones = []
        if fold is not None:
            layers = zip(fold.A.unbind(1), fold.B.unbind(1), strict=True)
            self.recording = [JointRecordingPair(A, B) for A, B in layers]
            backbones = [(None, self.recording)]
        with self.injection.active(Plan([(None, lora)], backbones)):
            logits = last_logits(self.injection.model, batch).float()  # [n b, keep, vocabulary]
        targets = batch.targets.flatten()
        nats = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="none"
        )
        return nats.view(self.num_runs, -1).sum(1)

    @property
    def trained_lora(self) -> list[nn.Parameter]:
        """The parameters of the LoRAs that train."""
        return [each for each in self.lora_parameters if each.requires_grad]

    @property
    def ratios(self) -> Tensor:
        """||dh|| / ||h|| of each layer of each run in the last forward pass: [n L]; or [0]."""
        if not self.recording:
            return torch.zeros(0, device=self.injection.model.device)
        return super().ratios.mT.flatten()  # of [L, n]

    def of_run(self, index: int, like: Sequence[Tensor]) -> list[Tensor]:
        """The parameters of one run, detached.

        Args:
            index: of the run.
            like: the parameters of the run's own model.
        """
        own = []
        for joint, parameter in zip(self.parameters(), like, strict=True):
            stacked = joint.detach().reshape(self.num_runs, *parameter.shape)
            own.append(stacked[index])
        return own


def joined(tensors: Sequence[Tensor], num_runs: int) -> Tensor:
    """Copies of tensors [n, ..] side by side in one: [n, p]; without any, [n, 0]."""
    flat = [tensor.detach().reshape(num_runs, -1) for tensor in tensors]
    return torch.cat(flat, dim=1) if flat else torch.zeros(num_runs, 0)


def parted(joint: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a tensor [n, p] in the shapes of those that are `joined` in it."""
    sizes = [tensor.numel() // len(joint) for tensor in like]
    parts = torch.split(joint, sizes, dim=1)
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _of_each_run(x: Tensor, weights: Tensor) -> Tensor:
    """x [n b, s, in] times the transposes of weights [n, out, in], those of its run."""
    rows = x.reshape(len(weights), -1, x.shape[-1])
    return torch.bmm(rows, weights.mT).view(*x.shape[:-1], -1)


def _joint_lora(loras: Sequence[Lora]) -> Lora:
    """The pairs of all runs, stacked."""
    first = loras[0]
    pairs: dict[str, LoraPair] = {}
    for path, pair in first.pairs.items():
        A = _stacked([lora.pairs[path].A for lora in loras])
        B = _stacked([lora.pairs[path].B for lora in loras])
        pairs[path] = JointLoraPair(A, B, pair.scaling)
    return Lora(first.config, pairs)


def _stacked(tensors: Sequence[Tensor]) -> nn.Parameter:
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    return nn.Parameter(stacked, requires_grad=tensors[0].requires_grad)


def _joint_backbone(backbones: Sequence[Backbone]) -> Backbone | None:
    """The layers of all runs, one after the other; None without any backbone."""
    if not backbones:
        return None
    joint = deepcopy(backbones[0])
    num_layers = joint.config.num_layers * len(backbones)
    joint.config = replace(joint.config, num_layers=num_layers)
    for name, parameter in backbones[0].named_parameters():
        layers = torch.cat([each.get_parameter(name).detach() for each in backbones])
        setattr(joint, name, nn.Parameter(layers, requires_grad=parameter.requires_grad))
    return joint
