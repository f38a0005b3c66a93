"""The frozen base model with the adapters that train on it.

Shapes: b rows, s positions, d hidden size.
"""

import torch
from torch import Tensor, nn

from crma.evaluation.evaluator import Batch, answer_logits, answer_loss
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Injection, Plan
from crma.method.lora import Lora


class RecordingPair(FoldedPair):
    """A layer's folded pair that keeps ||dh|| / ||h|| of the last forward pass in `ratio`."""

    ratio: Tensor | None = None

    def delta(self, h: Tensor) -> Tensor:
        """[b, s, d] -> [b, s, d], differentiable in the pair."""
        dh = super().delta(h)
        with torch.no_grad():
            self.ratio = dh.float().norm() / h.float().norm()
        return dh


class AdaptedModel(nn.Module):
    """The frozen base model with one LoRA and, in most arms, a backbone.

    Args:
        injection: the hooks on the base model.
        lora: a trainable LoRA.
        backbone: None in arms without CRMA.
        backbone_moves: whether the backbone trains. A backbone that stands still is folded once.
    """

    def __init__(
        self, injection: Injection, lora: Lora, backbone: Backbone | None, *, backbone_moves: bool
    ) -> None:
        super().__init__()
        self.injection = injection
        self.lora = lora
        self.lora_parameters = nn.ParameterList(lora.parameters())
        self.backbone = backbone
        self.backbone_moves = backbone_moves
        self.recording: list[RecordingPair] = []

    def forward(self, batch: Batch, *, crma: bool = True) -> Tensor:
        """The summed loss of a batch's answer tokens, in nats. `crma` switches the backbone."""
        backbones = []
        if self.backbone is not None and crma:
            if self.backbone_moves or not self.recording:
                self.recording = self._fold(self.backbone)
            backbones = [(None, self.recording)]
        with self.injection.active(Plan([(None, self.lora)], backbones)):
            logits = answer_logits(self.injection.model, batch)
            return answer_loss(logits, batch)

    @property
    def ratios(self) -> Tensor:
        """||dh|| / ||h|| of each layer in the last forward pass: [L]; [0] if there was none."""
        found = [pair.ratio for pair in self.recording if pair.ratio is not None]
        return torch.stack(found) if found else torch.zeros(0)

    def _fold(self, backbone: Backbone) -> list[RecordingPair]:
        """One pair a layer in the model's dtype, differentiable if the backbone trains."""
        dtype = self.injection.model.dtype
        with torch.set_grad_enabled(self.backbone_moves):
            A, B = backbone.fold()
            A, B = A.to(dtype), B.to(dtype)
        return [RecordingPair(a, b) for a, b in zip(A, B, strict=True)]
