"""Several LoRAs side by side, so that a batch of mixed rows needs two matrix products a site.

Shapes: b rows of a batch; in and out features of a site; r the rank of one pair; R the sum of the
ranks of all pairs on a site, over the adapters and over the linears of the site.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crma.method.lora import Lora, LoraPair
from server.engine.native.kernel import Kernel

MAX_MIXED = 256  # rows of prompts for which several adapters share a pair of products
NO_ADAPTER = -1

Site = tuple[str, ...]
"""Paths of linears that read the same input; their outputs lie side by side."""


@dataclass(frozen=True)
class _StackedSite:
    """The pairs of all adapters on one site.

    Adapter i owns rows `offsets[i]` to `offsets[i + 1]` of A and B.

    Attributes:
        A: [R, in].
        B: [R, out], with the scaling multiplied in.
        offsets: one more than there are adapters.
        offsets_tensor: the same as a tensor.
        spans: [R, 2]; row j of B belongs to one linear, so it is zero outside columns
            `spans[j, 0]` to `spans[j, 1]`.
    """

    A: Tensor
    B: Tensor
    offsets: tuple[int, ...]
    offsets_tensor: Tensor
    spans: Tensor


class _PlacedPair(NamedTuple):
    """A pair, the index of its adapter, and the first output column of its linear in the site."""

    adapter: int
    column: int
    pair: LoraPair


class LoraStack:
    """Copies of several LoRAs, stacked site by site.

    Args:
        loras: by digest; they are stacked in this order.
        sites: all sites of the model; those on which no LoRA has a pair are left out.
        shapes: module path -> (out, in).

    Attributes:
        index: digest -> the adapter's place in the stack.
        sites: the stacked weights of each site that has any.
    """

    def __init__(
        self,
        loras: Mapping[str, Lora],
        sites: Iterable[Site],
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        self.index = {digest: i for i, digest in enumerate(loras)}
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
    spans: list[tuple[int, int]] = []
    for adapter, start, pair in placed:
        width, rank = pair.B.shape
        stop = start + width
        row = len(spans)
        B[row : row + rank, start:stop] = (pair.B * pair.scaling).mT
        ranks[adapter] += rank
        spans += [(start, stop)] * rank
    offsets = (0, *accumulate(ranks))
    return _StackedSite(A, B, offsets, torch.tensor(offsets), torch.tensor(spans))


class StackedRows:
    """Adds to each row of a batch the delta of its own adapter; implements `RowDeltas`.

    The rows are cut into segments, each with its own pair of products. In a segment of several
    adapters every row pays for the products of all of them: for few rows that is still cheaper
    than a pair of products for each adapter.

    Args:
        stack: holds every adapter of the batch.
        digests: one a row; None for a row without an adapter. The first `num_single` rows are one
            segment. The rows after them must be in the stack's order; adapters share a segment
            there up to MAX_MIXED rows.
        num_single: how many rows at the start are single tokens of their sequences.
        kernel: computes the first segment; None: torch computes all of them.
    """

    def __init__(
        self,
        stack: LoraStack,
        digests: Sequence[str | None],
        num_single: int,
        kernel: Kernel | None = None,
    ) -> None:
        self._stack = stack
        self._kernel = kernel
        self._kernel_segments: list[_Segment] = []
        self._torch_segments: list[_Segment] = []
        adapters = [NO_ADAPTER if digest is None else stack.index[digest] for digest in digests]
        single = adapters[:num_single]
        start = 0
        for part in [single, *_cut(adapters[num_single:])]:
            if any(adapter != NO_ADAPTER for adapter in part):
                in_kernel = kernel is not None and start + len(part) <= num_single
                segments = self._kernel_segments if in_kernel else self._torch_segments
                segments.append(_Segment(start, part))
            start += len(part)

    def add_(self, site: Site, y: Tensor, x: Tensor) -> None:
        """Add each row's delta for x [b, in] to y [b, out], in place.

        Rows without an adapter, or whose adapter has no pair on the site, stay as they are.
        """
        stacked = self._stack.sites.get(site)
        if stacked is None:
            return
        if self._kernel is not None:
            for segment in self._kernel_segments:
                self._kernel.add_lora(
                    y[segment.rows],
                    x[segment.rows].contiguous(),
                    stacked.A,
                    stacked.B,
                    stacked.offsets_tensor,
                    stacked.spans,
                    segment.adapters,
                )
        for segment in self._torch_segments:
            columns = segment.columns(stacked)
            z = nn.functional.linear(x[segment.rows], stacked.A[columns])
            if segment.is_mixed:
                # Fill, do not multiply by 0: an overflowing adapter's infinity · 0 would be NaN.
                z.masked_fill_(segment.foreign(stacked), 0.0)
            y[segment.rows].addmm_(z, stacked.B[columns])


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
