"""A linear's weight as the kernel reads it: in bfloat16 or in 8 bits, in panels of outputs.

In a panel, consecutive inputs lie side by side for each of its outputs, as many as fit 32 bits.
That is the layout of the instructions that multiply such numbers, and others take it apart with
shifts.

Shapes: P panels; in and out features of the linear.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.engine.native.huge_pages import HugePages

PANEL = 32  # outputs of a panel
INPUTS = 32  # inputs of a tile of AMX; weights are padded to a multiple
MAX_INT8 = 127
ROWS_AT_ONCE = 32 * PANEL  # of a weight that is copied to another dtype or layout


def _packed(weight: Tensor, dtype: torch.dtype, memory: HugePages) -> Tensor:
    """Panels [P, words, PANEL, inputs of a word] of a weight [out, in], padded with zeros.

    Rows are cast to `dtype` and packed some at a time: a weight may be mapped from its file, and no
    other copy of it is made.
    """
    out, width = weight.shape
    of_word = 4 // dtype.itemsize
    num_words = -(-width // INPUTS) * INPUTS // of_word
    panels = memory.empty((-(-out // PANEL), num_words, PANEL, of_word), dtype)
    words = panels.view(torch.int32)[..., 0]  # torch moves whole words five times as fast
    first = 0
    for rows in torch.split(weight, ROWS_AT_ONCE):
        padded = pad(rows.to(dtype), (0, -width % INPUTS, 0, -len(rows) % PANEL))
        some = padded.contiguous().view(torch.int32).view(-1, PANEL, num_words).transpose(1, 2)
        words[first : first + len(some)] = some
        first += len(some)
    return panels


def _unpacked(panels: Tensor, out: int, width: int) -> Tensor:
    """A copy of the weight [out, in] that was packed."""
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:out, :width]


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in], which a tied embedding shares.

    Attributes:
        panels: bfloat16 [P, words, PANEL, 2], padded with zeros.
        out_features: of the linear.
        in_features: likewise.
    """

    panels: Tensor
    out_features: int
    in_features: int

    @classmethod
    def of(cls, weight: Tensor, memory: HugePages | None = None) -> Self:
        """Pack a weight [out, in], of any dtype; its values are rounded to bfloat16.

        Args:
            memory: where the panels lie, after those that it gave before; None: by themselves.
        """
        return cls(_packed(weight, torch.bfloat16, memory or HugePages()), *weight.shape)

    @property
    def num_words(self) -> int:
        """Words of an output, with the padding."""
        return self.panels.shape[1]

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the weight, in bfloat16: ids [b] -> [b, in]."""
        found = self.panels[ids // PANEL, :, ids % PANEL]
        return found.flatten(1)[:, : self.in_features]

    def unpacked(self) -> Tensor:
        """A copy of the weight as it was, in bfloat16: [out, in]."""
        return _unpacked(self.panels, self.out_features, self.in_features)


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] in 8 bits: row i is its values · scales[i].

    Attributes:
        panels: int8 [P, words, PANEL, 4], padded with zeros.
        scales: float32 [out]; a row's largest weight is MAX_INT8 times its scale.
        sums: int32 [out], of each row's values.
        out_features: of the linear.
        in_features: likewise.
    """

    panels: Tensor
    scales: Tensor
    sums: Tensor
    out_features: int
    in_features: int

    @classmethod
    def of(cls, weight: Tensor, memory: HugePages | None = None) -> Self:
        """Round a weight [out, in] to the nearest 8-bit values.

        Args:
            memory: as for `PackedWeight`.
        """
        parts = [_rounded(part) for part in torch.split(weight, ROWS_AT_ONCE)]
        values, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        sums = values.sum(dim=1, dtype=torch.int32)
        panels = _packed(values, torch.int8, memory or HugePages())
        return cls(panels, scales, sums, *weight.shape)

    @property
    def num_words(self) -> int:
        """Words of an output, with the padding."""
        return self.panels.shape[1]

    def values(self) -> Tensor:
        """A copy of the weight in 8 bits: [out, in]."""
        return _unpacked(self.panels, self.out_features, self.in_features)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest 8-bit values of rows [n, in], and their scales [n]."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp(min=1e-30) / MAX_INT8
    return (weight / scales[:, None]).round().to(torch.int8), scales


def is_exact_in_bfloat16(weight: Tensor) -> bool:
    """Whether rounding a weight to bfloat16 changes none of its values."""
    if weight.dtype == torch.bfloat16:
        return True
    parts = torch.split(weight, ROWS_AT_ONCE)  # so that no copy is as large as the weight
    return all(torch.equal(part.bfloat16().to(part.dtype), part) for part in parts)
