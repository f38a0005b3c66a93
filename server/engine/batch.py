"""Scheduled sequences -> the tensors of one forward pass.

Shapes: b rows, s tokens (left-padded, so that the last column is every row's newest token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crma.selection import AdapterSelection
from server.engine.scheduler import Step


@dataclass(frozen=True)
class Batch:
    """input_ids [b, s]; positions [b, s], -1 at padding; slots [b]; selections, one a row."""

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    selections: tuple[AdapterSelection, ...]


def build_batch(step: Step, device: torch.device) -> Batch:
    """Whole prompts for a prefill, the newest token of each sequence for a decode."""
    rows = [
        (list(s.request.prompt_ids), 0) if step.is_prefill else ([s.token_ids[-1]], s.num_computed_tokens)
        for s in step.sequences
    ]
    width = max(len(ids) for ids, _ in rows)
    return Batch(
        input_ids=torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in rows], device=device),
        positions=torch.tensor(
            [[-1] * (width - len(ids)) + list(range(start, start + len(ids))) for ids, start in rows], device=device
        ),
        slots=torch.tensor([s.slot for s in step.sequences], device=device),
        selections=tuple(s.request.selection for s in step.sequences),
    )
