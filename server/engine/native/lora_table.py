"""Where the pairs of a LoRA are in memory, for the kernel, which reads each row's adapter in place.

So nothing is copied when other adapters run than before.

Shapes: S sites of the model; P pairs of a site, the most that one has; b rows of a batch; in and
out, the features of a site.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import ref

import torch
from torch import Tensor

from crma.method.backbone import FoldedPair
from crma.method.frozen_linear import Affine
from crma.method.lora import Lora, LoraPair
from server.engine.native.kernel import Kernel
from server.engine.native.lora_stack import Site

# int64 of a pair: addresses of A [rank, in] and B [rank, width], rank, start, width, and addresses
# of the scale and the shift [width] of its outputs, 0 where they stay as they are.
_ENTRY = 7


def table_of(sites: Sequence[Sequence[tuple[int, LoraPair]]], pairs_of_site: int) -> Tensor:
    """The table [S, P, 7] of the pairs of each site, each after its first output column.

    Args:
        sites: the A of their pairs is contiguous, and so is B, transposed; the scaling is 1. The
            table does not keep them in memory.
        pairs_of_site: P.
    """
    rows = []
    for pairs in sites:
        entries = [_entry(start, pair) for start, pair in pairs]
        entries += [[0] * _ENTRY] * (pairs_of_site - len(pairs))
        rows.append(entries)
    return torch.tensor(rows)


def _entry(start: int, pair: LoraPair) -> list[int]:
    assert pair.A.is_contiguous()
    assert pair.B.mT.is_contiguous()
    assert pair.scaling == 1.0
    out, rank = pair.B.shape
    return [pair.A.data_ptr(), pair.B.data_ptr(), rank, start, out, *_rescaling(pair)]


def _rescaling(pair: LoraPair) -> tuple[int, int]:
    output = pair.output
    if output is None:
        return 0, 0
    assert isinstance(output, Affine)
    assert output.scale.is_contiguous()
    assert output.shift.is_contiguous()
    return output.scale.data_ptr(), output.shift.data_ptr()


def backbone_uses(
    rows: Tensor | None, pairs: Iterable[FoldedPair], num_rows: int
) -> tuple[Tensor, Tensor]:
    """A backbone as the kernel sees it: a LoRA with one pair a layer, which some rows use.

    Args:
        rows: those that use it, of `num_rows`; None: all.
        pairs: one a layer.

    Returns:
        int64 [num_rows], where the backbone's table is, or 0; and the table, to be kept meanwhile.
    """
    table = table_of([[(0, LoraPair(A, B, 1.0))] for A, B in pairs], 1)
    uses = torch.zeros(num_rows, dtype=torch.int64)
    uses[slice(None) if rows is None else rows] = table.data_ptr()
    return uses, table


@dataclass(frozen=True)
class _Known:
    """What is kept of an adapter: nothing that keeps it in memory.

    Attributes:
        lora: the adapter, as long as it is resident.
        table: [S, P, 7].
        sites: those on which it has a pair.
    """

    lora: ref[Lora]
    table: Tensor
    sites: frozenset[Site]


class LoraTables:
    """The tables of the adapters that have been used lately.

    Args:
        sites: all sites of the model.
        shapes: module path -> (out, in).

    Attributes:
        places: site -> its index in the tables, and the first output column of each of its linears.
        pairs_of_site: P.
    """

    def __init__(self, sites: Sequence[Site], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.pairs_of_site = max(map(len, sites))
        self.places: dict[Site, tuple[int, list[int]]] = {}
        for index, site in enumerate(sites):
            columns = [0, *accumulate(shapes[path][0] for path in site)]
            self.places[site] = index, columns[:-1]
        self._known: dict[str, _Known] = {}

    def find(self, digest: str, lora: Lora) -> _Known:
        """What is known of an adapter, computed once for as long as it is resident."""
        known = self._known.get(digest)
        if known is None or known.lora() is not lora:
            self._known = {d: each for d, each in self._known.items() if each.lora() is not None}
            known = self._known[digest] = self._know(lora)
        return known

    def _know(self, lora: Lora) -> _Known:
        pairs = lora.pairs
        return _Known(
            ref(lora),
            table_of([self._placed(site, lora) for site in self.places], self.pairs_of_site),
            frozenset(site for site in self.places if not pairs.keys().isdisjoint(site)),
        )

    def _placed(self, site: Site, lora: Lora) -> list[tuple[int, LoraPair]]:
        _, columns = self.places[site]
        placed = zip(columns, site, strict=True)
        return [(start, lora.pairs[path]) for start, path in placed if path in lora.pairs]


class LoraRows:
    """Applies to each row of a batch its own adapter, in the kernel; implements `RowDeltas`.

    Args:
        tables: find each adapter's pairs.
        loras: by digest; those of the batch stay in memory until it is computed.
        digests: one a row; None for a row without an adapter.
        kernel: computes the deltas, except that of an embedding.

    Attributes:
        addresses: int64 [b], of each row's table; 0 for a row without an adapter.
        pairs_of_site: P.
    """

    def __init__(
        self,
        tables: LoraTables,
        loras: Mapping[str, Lora],
        digests: Sequence[str | None],
        kernel: Kernel,
    ) -> None:
        self._kernel = kernel
        self._tables = tables
        self.pairs_of_site = tables.pairs_of_site
        self._loras = {digest: loras[digest] for digest in digests if digest is not None}
        known = {digest: tables.find(digest, lora) for digest, lora in self._loras.items()}
        addresses = {digest: each.table.data_ptr() for digest, each in known.items()}
        self.addresses = torch.tensor([addresses.get(digest or "", 0) for digest in digests])
        self._known = list(known.values())
        self._digests = digests

    def add_(self, site: Site, y: Tensor, x: Tensor) -> None:
        """Change each row of y [b, out] as its adapter does for its row of x, in place.

        x is [b, in], or, of the embedding, token ids [b]. Rows without an adapter, or whose adapter
        has no pair on the site, stay as they are.
        """
        if not any(site in each.sites for each in self._known):
            return
        index, _ = self._tables.places[site]
        if x.is_floating_point():
            self._kernel.add_lora(y, x.contiguous(), self.addresses, index, self.pairs_of_site)
        else:
            self._embed(site[0], y, x)

    def _embed(self, path: str, y: Tensor, ids: Tensor) -> None:
        for digest, lora in self._loras.items():
            pair = lora.pairs.get(path)
            if pair is None:
                continue
            rows = self._rows(digest)
            if isinstance(pair.output, Affine):
                y.copy_(pair.output.applied(y, rows))
            y.index_add_(0, rows, pair.delta(ids[rows]))

    def _rows(self, digest: str) -> Tensor:
        """The rows of an adapter, as an index."""
        return torch.tensor([i for i, each in enumerate(self._digests) if each == digest])
