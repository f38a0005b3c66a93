"""A linear's weight as the kernel reads it: in bfloat16, in panels of columns.

In a panel, two consecutive inputs lie side by side for each of its outputs. That is the layout of
the instructions that multiply bfloat16, and others take it apart with a shift and a mask.

Shapes: P panels; in and out features of the linear.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 16  # outputs of a panel
INPUTS = 32  # inputs of a tile of AMX; weights are padded to a multiple


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in], which a tied embedding shares.

    Attributes:
        panels: bfloat16 [P, pairs, PANEL, 2], padded with zeros.
        out_features: of the linear.
        in_features: likewise.
    """

    panels: Tensor
    out_features: int
    in_features: int

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Pack a weight [out, in], of any dtype; its values are rounded to bfloat16."""
        out, width = weight.shape
        padded = pad(weight.bfloat16(), (0, -width % INPUTS, 0, -out % PANEL))
        panels = padded.view(-1, PANEL, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
        return cls(panels, out, width)

    @property
    def num_pairs(self) -> int:
        """Pairs of inputs in a panel, with the padding."""
        return self.panels.shape[1]

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the weight, in bfloat16: ids [b] -> [b, in]."""
        found = self.panels[ids // PANEL, :, ids % PANEL]
        return found.flatten(1)[:, : self.in_features]

    def unpacked(self) -> Tensor:
        """A copy of the weight as it was, in bfloat16: [out, in]."""
        rows = self.panels.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows[: self.out_features, : self.in_features]


def is_exact_in_bfloat16(weight: Tensor) -> bool:
    """Whether rounding a weight to bfloat16 changes none of its values."""
    parts = torch.split(weight, 1024)  # so that no copy is as large as the weight
    return all(torch.equal(part.bfloat16().to(part.dtype), part) for part in parts)
