"""Several LoRAs side by side, so that a batch of mixed rows needs two matrix products a site.

For where there is no kernel, which would read each row's adapter in place (lora_table.py).

Shapes: b rows of a batch; in and out features of a site; r the rank of one pair; R the sum of the
ranks of all pairs on a site, over the adapters and over the linears of the site.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crma.method.frozen_linear import Affine
from crma.method.lora import Lora, LoraPair

MAX_MIXED = 256  # rows of prompts for which several adapters share a pair of products
NO_ADAPTER = -1

Site = tuple[str, ...]
"""Paths of linears that read the same input; their outputs lie side by side.

The model's embedding is a site of its own, whose input is token ids.
"""


@dataclass(frozen=True)
class _StackedAffine:
    """The rescalings of one site, y -> scale · y + shift, of all adapters.

    Attributes:
        scale: fp32 [adapters + 1, out]; ones where an adapter has none. The last row, which
            NO_ADAPTER indexes, is ones too.
        shift: fp32 [adapters + 1, out], likewise, of zeros.
    """

    scale: Tensor
    shift: Tensor

    def apply_(self, y: Tensor, adapters: Tensor) -> None:
        """Rescale each row of y [b, out] by its adapter, in place.

        A row without a rescaling keeps its bits: it is multiplied by 1 in fp32, and gets 0.
        """
        y.copy_(y.float() * self.scale[adapters] + self.shift[adapters])


@dataclass(frozen=True)
class _StackedSite:
    """The pairs of all adapters on one site.

    Adapter i owns rows `offsets[i]` to `offsets[i + 1]` of A and B.

    Attributes:
        A: [R, in].
        B: [R, out], with the scaling multiplied in.
        offsets: one more than there are adapters.
        offsets_tensor: the same as a tensor.
        affine: None: no adapter rescales the outputs.
    """

    A: Tensor
    B: Tensor
    offsets: tuple[int, ...]
    offsets_tensor: Tensor
    affine: _StackedAffine | None


class _PlacedPair(NamedTuple):
    """A pair, the index of its adapter, and the first output column of its linear in the site."""

    adapter: int
    column: int
    pair: LoraPair


class LoraStack:
    """Copies of several LoRAs, stacked site by site.

    Args:
        loras: by digest; they are stacked in this order. Each is finite as it serves, `scaled_b`
            included: a row's zeros meet the weights of its neighbours' adapters in a product, and
            infinity · 0 would be NaN.
        sites: all sites of the model; those on which no LoRA has a pair are left out.
        shapes: module path -> (out, in).

    Attributes:
        index: digest -> the adapter's place in the stack.
        rescaling: the places of the adapters that rescale outputs somewhere.
        sites: the stacked weights of each site that has any.
    """

    def __init__(
        self,
        loras: Mapping[str, Lora],
        sites: Iterable[Site],
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        self.index = {digest: i for i, digest in enumerate(loras)}
        self.rescaling = {
            i for i, lora in enumerate(loras.values()) if any(map(_affine, lora.pairs.values()))
        }
        self.sites: dict[Site, _StackedSite] = {}
        for site in sites:
            widths = [shapes[path][0] for path in site]
            placed = _place(site, widths, loras.values())
            if placed:
                self.sites[site] = _stack(placed, len(loras), sum(widths))


def _place(site: Site, widths: Sequence[int], loras: Iterable[Lora]) -> list[_PlacedPair]:
    """List the pairs on a site, adapter by adapter; `widths` are the linears' output features."""
    columns = [0, *accumulate(widths)][:-1]
    placed = []
    for adapter, lora in enumerate(loras):
        for path, column in zip(site, columns, strict=True):
            if path in lora.pairs:
                placed.append(_PlacedPair(adapter, column, lora.pairs[path]))
    return placed


def _stack(placed: Sequence[_PlacedPair], num_adapters: int, out: int) -> _StackedSite:
    A = torch.cat([each.pair.A for each in placed])
    B = A.new_zeros(len(A), out)
    ranks = [0] * num_adapters
    row = 0
    for adapter, start, pair in placed:
        width, rank = pair.B.shape
        B[row : row + rank, start : start + width] = pair.scaled_b.mT
        ranks[adapter] += rank
        row += rank
    offsets = (0, *accumulate(ranks))
    affine = _stack_affine(placed, num_adapters, out)
    return _StackedSite(A, B, offsets, torch.tensor(offsets), affine)


def _affine(pair: LoraPair) -> Affine | None:
    """The rescaling of a pair. What was only learned of it must have been bound to the linear."""
    assert pair.output is None or isinstance(pair.output, Affine)
    return pair.output


def _stack_affine(
    placed: Sequence[_PlacedPair], num_adapters: int, out: int
) -> _StackedAffine | None:
    affines = [_affine(each.pair) for each in placed]
    if not any(affines):
        return None
    device = placed[0].pair.A.device
    scale = torch.ones(num_adapters + 1, out, device=device)
    shift = torch.zeros(num_adapters + 1, out, device=device)
    for each, affine in zip(placed, affines, strict=True):
        if affine is None:
            continue
        columns = slice(each.column, each.column + len(affine.scale))
        scale[each.adapter, columns] = affine.scale
        shift[each.adapter, columns] = affine.shift
    return _StackedAffine(scale, shift)


class StackedRows:
    """Applies to each row of a batch its own adapter; implements `RowDeltas`.

    The rows are cut into segments, each with its own pair of products. In a segment of several
    adapters every row pays for the products of all of them: for few rows that is still cheaper
    than a pair of products for each adapter.

    Args:
        stack: holds every adapter of the batch.
        digests: one a row; None for a row without an adapter. The first `num_single` rows are one
            segment. The rows after them must be in the stack's order; adapters share a segment
            there up to MAX_MIXED rows.
        num_single: how many rows at the start are single tokens of their sequences.
    """

    def __init__(self, stack: LoraStack, digests: Sequence[str | None], num_single: int) -> None:
        self._stack = stack
        self._segments: list[_Segment] = []
        adapters = [NO_ADAPTER if digest is None else stack.index[digest] for digest in digests]
        self._rescaled: Tensor | None = None
        if not stack.rescaling.isdisjoint(adapters):
            self._rescaled = torch.tensor(adapters)
        start = 0
        for part in [adapters[:num_single], *_cut(adapters[num_single:])]:
            if any(adapter != NO_ADAPTER for adapter in part):
                self._segments.append(_Segment(start, part))
            start += len(part)

    def add_(self, site: Site, y: Tensor, x: Tensor) -> None:
        """Change each row of y [b, out] as its adapter does for its row of x, in place.

        x is [b, in], or, of the embedding, token ids [b]. Rows without an adapter, or whose adapter
        has no pair on the site, stay as they are.
        """
        stacked = self._stack.sites.get(site)
        if stacked is None:
            return
        if stacked.affine is not None and self._rescaled is not None:
            stacked.affine.apply_(y, self._rescaled)
        for segment in self._segments:
            columns = segment.columns(stacked)
            z = _low_rank(x[segment.rows], stacked.A[columns])
            if segment.is_mixed:
                # Fill, do not multiply by 0: an overflowing adapter's infinity · 0 would be NaN.
                z.masked_fill_(segment.foreign(stacked), 0.0)
            y[segment.rows].addmm_(z, stacked.B[columns])


def _low_rank(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ [b, R] for x [b, in], or for token ids [b], which stand for one-hot rows."""
    return nn.functional.linear(x, A) if x.is_floating_point() else A[:, x].mT


def _cut(adapters: Sequence[int]) -> list[list[int]]:
    """Cut rows in the stack's order into segments: one adapter, or several up to MAX_MIXED rows."""
    segments: list[list[int]] = []
    for _, group in groupby(adapters):
        rows = list(group)
        if segments and len(segments[-1]) + len(rows) <= MAX_MIXED:
            segments[-1] += rows
        else:
            segments.append(rows)
    return segments


class _Segment:
    """Consecutive rows of a batch, at least one of them with an adapter.

    Args:
        start: the first row.
        adapters: each row's place in the stack, or NO_ADAPTER.
    """

    def __init__(self, start: int, adapters: Sequence[int]) -> None:
        distinct = set(adapters)
        self.rows = slice(start, start + len(adapters))
        self.adapters = torch.tensor(adapters)
        self.is_mixed = len(distinct) > 1
        self._lowest = min(distinct - {NO_ADAPTER})
        self._highest = max(distinct)
        self._foreign: dict[tuple[int, ...], Tensor] = {}

    def columns(self, stacked: _StackedSite) -> slice:
        """The rows of A and B from the segment's lowest adapter to its highest."""
        return slice(stacked.offsets[self._lowest], stacked.offsets[self._highest + 1])

    def foreign(self, stacked: _StackedSite) -> Tensor:
        """Bool [rows, columns]: true where the column belongs to another adapter than the row's.

        Sites on which the adapters have the same ranks share one mask.
        """
        known = self._foreign.get(stacked.offsets)
        if known is None:
            ranks = stacked.offsets_tensor.diff()
            owners = torch.arange(len(ranks)).repeat_interleave(ranks)[self.columns(stacked)]
            foreign = owners != self.adapters[:, None]
            known = foreign.to(stacked.A.device)
            self._foreign[stacked.offsets] = known
        return known
