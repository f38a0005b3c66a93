"""What earlier tasks read from the residual stream, and a backbone that leaves it alone.

A backbone whose read projection R changes only in directions that no earlier block output has does
not change what it reads from them. The idea is that of gradient projection (Saha, Garg & Roy 2021,
"Gradient Projection Memory"), applied to the *updates* of the optimizer: AdamW's are no multiple of
the gradient, so a projected gradient would not stay in the complement. R is divided by its norm
where that exceeds 1 (docs/method.md, section 2), so what is protected still scales with it: drift
is small, not 0.

Shapes: L layers; d hidden size; b rows, s positions; h [b, s, d] the output of a block.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crma.evaluation.evaluator import Encoded, answer_logits, collate
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Injection, Plan
from crma.method.lora import Lora

ENERGY = 0.999  # share of the second moment that is protected
ROWS = 50  # in a batch
NAME = "second_moments"


class CountingPair(FoldedPair):
    """A layer's folded pair that adds up h hᵀ over the positions of its inputs, each of norm 1."""

    moments: Tensor  # [d, d] float32
    mask: Tensor  # [b, s] bool: the positions that are no padding

    def delta(self, h: Tensor) -> Tensor:
        """[b, s, d] -> [b, s, d]."""
        unit = nn.functional.normalize(h[self.mask].float(), dim=-1)
        self.moments.addmm_(unit.mT, unit)
        return super().delta(h)


@torch.inference_mode()
def second_moments(
    injection: Injection, lora: Lora, backbone: Backbone, rows: Sequence[Encoded], pad_id: int
) -> Tensor:
    """The sum of h hᵀ over all positions of some rows, each h of norm 1: [L, d, d] float32.

    Args:
        injection: the model.
        lora: the task adapter of the rows, on the model's device.
        backbone: that it was trained with.
        rows: the examples.
        pad_id: the padding token.
    """
    model = injection.model
    dtype = model.dtype
    pairs = []
    for folded in backbone.folded(model.device, dtype):
        pair = CountingPair(*folded)
        pair.moments = torch.zeros(len(folded.B), len(folded.B), device=model.device)
        pairs.append(pair)
    plan = Plan([(None, lora.to(model.device, dtype))], [(None, pairs)])
    with injection.active(plan):
        for start in range(0, len(rows), ROWS):
            batch = collate(rows[start : start + ROWS], pad_id, model.device)
            for pair in pairs:
                pair.mask = batch.attention_mask.bool()
            answer_logits(model, batch)
    return torch.stack([pair.moments for pair in pairs]).cpu()


def free_directions(moments: Tensor, energy: float = ENERGY) -> Tensor:
    """The projection on what lies outside the protected span of every layer.

    The span is that of the fewest eigenvectors, the largest first, that hold `energy` of the trace.

    Args:
        moments: [L, d, d] symmetric, not negative.
        energy: share of each layer's trace.

    Returns:
        [L, d, d] float32, symmetric: I minus the projection on the span.
    """
    values, vectors = torch.linalg.eigh(moments.double())  # ascending
    values = values.clamp(min=0)
    held_before = values.flip(-1).cumsum(-1) - values.flip(-1)  # by the larger ones
    total = values.sum(-1, keepdim=True)
    is_protected = (held_before < energy * total).flip(-1)  # [L, d]
    span = vectors * is_protected[:, None, :]
    identity = torch.eye(moments.shape[-1], dtype=torch.float64)
    return (identity - span @ span.mT).float()


def save_moments(path: Path, moments: Tensor) -> None:
    """Write the moments of a stage; `sum_of_moments` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({NAME: moments.contiguous()}, path)


def sum_of_moments(paths: Iterable[Path]) -> Tensor | None:
    """The sum over stages, [L, d, d]; None without any."""
    found = [load_file(path)[NAME] for path in paths]
    return torch.stack(found).sum(0) if found else None
