"""Several task adapters side by side, so that a batch of mixed rows takes two products a site.

Shapes: b rows; in and out of a site, which is one linear or several that read the same input; R the
sum of the adapters' ranks over the linears of a site.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn

from crma.method.lora import Lora
from server.engine.native.kernel import Kernel

MAX_MIXED = 256  # rows of prompts that adapters share a product for

Site = tuple[str, ...]  # paths of linears that read the same input, whose outputs lie side by side


@dataclass(frozen=True)
class _Stacked:
    """A [R, in] and B [R, out] of a site; adapter i has the rows from first[i] to first[i + 1], of which each adds to
    the outputs of its span [R, 2]. first_at: first as a tensor."""

    A: Tensor
    B: Tensor
    first: tuple[int, ...]
    first_at: Tensor
    spans: Tensor


class LoraStack:
    """Several task adapters side by side, so that any mix of rows takes two products a site.

    R is the sum of ranks over adapters and over the modules of the site; B has a block for each module's part of the
    output, scaling multiplied into it, and is zero elsewhere. The weights are copies.

    Args:
        loras: by digest, in the order in which they lie.
        sites: all of them; those without a pair are left out.
        shapes: module path -> (out, in).
    """

    def __init__(
        self,
        loras: Mapping[str, Lora],
        sites: Iterable[Site],
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        self.index = {digest: i for i, digest in enumerate(loras)}
        self.sites: dict[Site, _Stacked] = {}
        for site in sites:
            *starts, width = accumulate((shapes[path][0] for path in site), initial=0)
            placed = [  # (adapter, where its module's output starts, pair)
                (i, start, lora.pairs[path])
                for i, lora in enumerate(loras.values())
                for start, path in zip(starts, site, strict=True)
                if path in lora.pairs
            ]
            if placed:
                A = torch.cat([pair.A for _, _, pair in placed])
                B, ranks, row = A.new_zeros(len(A), width), [0] * len(loras), 0
                spans = []
                for i, start, pair in placed:
                    rows = slice(row, row := row + len(pair.A))
                    B[rows, start : start + len(pair.B)] = (pair.B * pair.scaling).mT
                    ranks[i] += len(pair.A)
                    spans += [(start, start + len(pair.B))] * len(pair.A)
                first = (0, *accumulate(ranks))
                self.sites[site] = _Stacked(A, B, first, torch.tensor(first), torch.tensor(spans))


class StackedRows:
    """Which adapter of a stack each row of a batch uses.

    Rows are taken in stretches, with a pair of products each. A stretch of several adapters costs its rows the products
    of all of them: for few rows less than a pair of products for each adapter.

    Args:
        digests: one a row, None: no adapter. The first `num_single` are one stretch; those after them are in the
            stack's order, and adapters share a stretch up to MAX_MIXED rows.
        kernel: computes the first stretch, if there is one.
    """

    def __init__(
        self,
        stack: LoraStack,
        digests: Sequence[str | None],
        num_single: int,
        kernel: Kernel | None = None,
    ) -> None:
        self.stack = stack
        self.kernel = kernel
        self.num_kernel = num_single if kernel is not None else 0
        adapters = [-1 if digest is None else stack.index[digest] for digest in digests]
        parts = [adapters[:num_single]]
        for _, group in groupby(adapters[num_single:]):
            own = list(group)
            if len(parts) > 1 and len(parts[-1]) + len(own) <= MAX_MIXED:
                parts[-1] += own
            else:
                parts.append(own)
        starts = accumulate(map(len, parts), initial=0)
        self._stretches = [
            _Stretch(start, part)
            for start, part in zip(starts, parts, strict=False)
            if max(part, default=-1) >= 0
        ]

    def add_(self, site: Site, y: Tensor, x: Tensor) -> None:
        """Adds to y [b, out] in place, each row its own adapter's delta for x [b, in]; to a row without one, nothing.

        Other adapters' columns are cut out between the two products, not multiplied by 0: 0 · infinity is NaN.
        """
        if (stacked := self.stack.sites.get(site)) is not None:
            for stretch in self._stretches:
                if self.kernel is not None and stretch.rows.stop <= self.num_kernel:
                    tensors = (
                        stacked.A,
                        stacked.B,
                        stacked.first_at,
                        stacked.spans,
                        stretch.adapters,
                    )
                    self.kernel.add_lora(y[stretch.rows], x[stretch.rows].contiguous(), *tensors)
                    continue
                rows, columns = (
                    stretch.rows,
                    slice(stacked.first[stretch.low], stacked.first[stretch.high]),
                )
                z = nn.functional.linear(x[rows], stacked.A[columns])
                if stretch.is_mixed:
                    z.masked_fill_(stretch.foreign(stacked, columns), 0.0)
                y[rows].addmm_(z, stacked.B[columns])


class _Stretch:
    """Rows from `start`, each with its place in a stack or -1; low to high: the adapters among them."""

    def __init__(self, start: int, adapters: Sequence[int]) -> None:
        used = set(adapters)
        self.rows = slice(start, start + len(adapters))
        self.low, self.high = min(used - {-1}), max(used) + 1
        self.is_mixed = len(used) > 1
        self.adapters = torch.tensor(adapters)
        self._foreign: dict[tuple[int, ...], Tensor] = {}

    def foreign(self, stacked: _Stacked, columns: slice) -> Tensor:
        """Bool [rows, columns]: others' columns. Sites on which the same adapters lie with the same ranks share it."""
        if (known := self._foreign.get(stacked.first)) is None:
            counts = torch.tensor(stacked.first).diff()
            owners = torch.arange(len(counts)).repeat_interleave(counts)[columns]
            known = self._foreign[stacked.first] = (owners != self.adapters[:, None]).to(
                stacked.A.device
            )
        return known
