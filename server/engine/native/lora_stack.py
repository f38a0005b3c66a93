"""Several LoRAs side by side, so that a batch of mixed rows takes few matrix products a site.

For where there is no kernel, which would read each row's adapter in place (lora_table.py): on a
GPU, and without a compiler.

Each adapter that a step uses has a slot, into which its weights are copied once; they stay until
another adapter needs the slot. Rows are grouped by their adapter, and multiplied by its weights
only: groups of few rows in one batched product, padded to the largest of them, and each large group
in a product of its own.

Shapes: b rows of a batch; in and out features of a site; K slots; R the rank of a site: of the
adapters in the slots, the largest sum of the ranks of one's pairs on the linears of the site.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from crma.method.frozen_linear import Affine
from crma.method.lora import Lora, LoraPair

MAX_FEW = 16  # rows of a group that shares a batched product with others
NO_SLOT = -1

Site = tuple[str, ...]
"""Paths of linears that read the same input; their outputs lie side by side.

The model's embedding is a site of its own, whose input is token ids.
"""


class _PlacedPair(NamedTuple):
    """A pair, and the first output column of its linear in the site."""

    column: int
    pair: LoraPair


@dataclass
class _SlottedSite:
    """The pairs of all slots on one site: zeros where an adapter has none, or a lower rank.

    Attributes:
        A: [K, R, in].
        B: [K, R, out], with the scaling multiplied in; zero outside of a pair's own linear.
        scale: fp32 [K + 1, out] of the rescaling y -> scale · y + shift, the first row of those
            without an adapter; ones where a slot has none. None: no adapter has rescaled yet.
        shift: fp32 [K + 1, out] likewise, of zeros.
        ranks: of each slot.
    """

    A: Tensor
    B: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    ranks: list[int] = field(default_factory=list)

    def write(self, slot: int, placed: Sequence[_PlacedPair]) -> None:
        """Replace what is in a slot by these pairs."""
        self.ranks[slot] = sum(len(pair.A) for _, pair in placed)
        self.resize(len(self.ranks))
        self.A[slot].zero_()
        self.B[slot].zero_()
        row = 0
        for column, pair in placed:
            width, rank = pair.B.shape
            self.A[slot, row : row + rank] = pair.A
            self.B[slot, row : row + rank, column : column + width] = pair.scaled_b.mT
            row += rank
        self._write_affine(slot, placed)

    def _write_affine(self, slot: int, placed: Sequence[_PlacedPair]) -> None:
        affines = [(column, _affine(pair)) for column, pair in placed]
        if self.scale is None or self.shift is None:
            if not any(affine for _, affine in affines):
                return
            out = self.B.shape[2]
            self.scale = self.B.new_ones(len(self.ranks) + 1, out, dtype=torch.float32)
            self.shift = torch.zeros_like(self.scale)
        self.scale[slot + 1] = 1.0
        self.shift[slot + 1] = 0.0
        for column, affine in affines:
            if affine is not None:
                columns = slice(column, column + len(affine.scale))
                self.scale[slot + 1, columns] = affine.scale
                self.shift[slot + 1, columns] = affine.shift

    def resize(self, num_slots: int) -> None:
        """Make room for so many slots, and for the highest rank, but no higher one."""
        self.ranks += [0] * (num_slots - len(self.ranks))
        rank = max(self.ranks)
        self.A = _resized(self.A, (num_slots, rank, self.A.shape[2]))
        self.B = _resized(self.B, (num_slots, rank, self.B.shape[2]))
        if self.scale is not None and self.shift is not None:
            shape = (num_slots + 1, self.B.shape[2])
            self.scale = _resized(self.scale, shape, fill=1.0)
            self.shift = _resized(self.shift, shape)

    def rescale_(self, y: Tensor, rows: Tensor) -> None:
        """Rescale each row of y [b, out], in place, as the row of `scale` and `shift` says.

        A row without a rescaling keeps its bits: it is multiplied by 1 in fp32, and gets 0.
        """
        if self.scale is not None and self.shift is not None:
            y.copy_(y.float() * self.scale[rows] + self.shift[rows])


def _resized(tensor: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """The tensor itself, or a copy of another shape: cut off, or filled up."""
    if tensor.shape == shape:
        return tensor
    resized = tensor.new_full(shape, fill)
    common = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, shape, strict=True))
    resized[common] = tensor[common]
    return resized


def _affine(pair: LoraPair) -> Affine | None:
    """The rescaling of a pair. What was only learned of it must have been bound to the linear."""
    assert pair.output is None or isinstance(pair.output, Affine)
    return pair.output


class LoraStack:
    """Copies of the LoRAs that were used lately, as many as one step has needed at most.

    Args:
        sites: all sites of the model.
        shapes: module path -> (out, in).

    Attributes:
        slots: digest -> slot, the least recently used first.
        rescaling: the slots of the adapters that rescale outputs somewhere.
        sites: the weights of each site on which an adapter has had a pair.
    """

    def __init__(self, sites: Iterable[Site], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.slots: dict[str, int] = {}
        self.rescaling: set[int] = set()
        self.sites: dict[Site, _SlottedSite] = {}
        self._all_sites = tuple(sites)
        self._shapes = shapes
        self._num_slots = 0

    def hold(self, loras: Mapping[str, Lora]) -> None:
        """Give each of these adapters a slot.

        The slots of others are taken where there is none left: first of those that were not used
        for the longest time.
        """
        held = {digest: self.slots.pop(digest) for digest in loras if digest in self.slots}
        missing = [digest for digest in loras if digest not in held]
        self._grow(len(loras))
        occupied = {*held.values(), *self.slots.values()}
        empty = [slot for slot in range(self._num_slots) if slot not in occupied]
        for digest in missing:
            slot = empty.pop(0) if empty else self.slots.pop(next(iter(self.slots)))
            self._write(slot, loras[digest])
            held[digest] = slot
        self.slots |= held

    def _grow(self, num_slots: int) -> None:
        if num_slots <= self._num_slots:
            return
        self._num_slots = num_slots
        for site in self.sites.values():
            site.resize(num_slots)

    def _write(self, slot: int, lora: Lora) -> None:
        """Copy an adapter into a slot."""
        self.rescaling.discard(slot)
        if any(_affine(pair) for pair in lora.pairs.values()):
            self.rescaling.add(slot)
        for site in self._all_sites:
            columns = [0, *accumulate(self._shapes[path][0] for path in site)]
            placed = [
                _PlacedPair(column, lora.pairs[path])
                for column, path in zip(columns, site, strict=False)
                if path in lora.pairs
            ]
            if placed and site not in self.sites:
                self.sites[site] = self._new_site(site, placed[0].pair.A)
            if site in self.sites:
                self.sites[site].write(slot, placed)

    def _new_site(self, site: Site, like: Tensor) -> _SlottedSite:
        """A site with all slots and no pairs, in the dtype of `like` and on its device."""
        out = sum(self._shapes[path][0] for path in site)
        slotted = _SlottedSite(like.new_zeros(0, 0, like.shape[1]), like.new_zeros(0, 0, out))
        slotted.resize(self._num_slots)
        return slotted


@dataclass(frozen=True)
class _Groups:
    """Groups of rows, each of one adapter, that share a batched product.

    Attributes:
        slots: n neighbouring slots; one without rows has none but padding.
        width: w, the rows of the largest group.
        padded: [n · w], the rows of the batch, slot by slot; 0 pads.
        rows: [k], those that are no padding.
        places: [k], where these are in `padded`.
        owners: [n · w], the slot of each.
    """

    slots: slice
    width: int
    padded: Tensor
    rows: Tensor
    places: Tensor
    owners: Tensor

    @classmethod
    def of(cls, rows_of: Mapping[int, list[int]], device: torch.device) -> "_Groups":
        """The groups of some slots: slot -> rows of the batch."""
        lowest, highest = min(rows_of), max(rows_of)
        width = max(map(len, rows_of.values()))
        padded: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        owners: list[int] = []
        for slot in range(lowest, highest + 1):
            own = rows_of.get(slot, [])
            places += range(len(padded), len(padded) + len(own))
            padded += own + [0] * (width - len(own))
            rows += own
            owners += [slot] * width
        indices = (torch.tensor(each, device=device) for each in (padded, rows, places, owners))
        return cls(slice(lowest, highest + 1), width, *indices)

    def add_(self, site: _SlottedSite, y: Tensor, x: Tensor) -> None:
        """Add the groups' deltas to y; see `StackedRows.add_`."""
        inputs = x.index_select(0, self.padded)
        if x.is_floating_point():
            low_rank = inputs.view(-1, self.width, inputs.shape[1]) @ site.A[self.slots].mT
        else:  # token ids, which stand for one-hot rows
            chosen = site.A[self.owners, :, inputs]
            low_rank = chosen.view(-1, self.width, chosen.shape[1])
        deltas = (low_rank @ site.B[self.slots]).flatten(0, 1)
        y.index_add_(0, self.rows, deltas.index_select(0, self.places))


class StackedRows:
    """Applies to each row of a batch its own adapter; implements `RowDeltas`.

    Args:
        stack: holds every adapter of the batch, until it is computed.
        digests: one a row; None for a row without an adapter.
        device: of the batch.
    """

    def __init__(
        self, stack: LoraStack, digests: Sequence[str | None], device: torch.device
    ) -> None:
        self._stack = stack
        slots = [NO_SLOT if digest is None else stack.slots[digest] for digest in digests]
        self._rescaled: Tensor | None = None
        if not stack.rescaling.isdisjoint(slots):
            self._rescaled = torch.tensor([slot + 1 for slot in slots], device=device)
        self._groups = [_Groups.of(part, device) for part in _parts(slots)]

    def add_(self, site: Site, y: Tensor, x: Tensor) -> None:
        """Change each row of y [b, out] as its adapter does for its row of x, in place.

        x is [b, in], or, of the embedding, token ids [b]. Rows without an adapter, or whose adapter
        has no pair on the site, stay as they are.
        """
        slotted = self._stack.sites.get(site)
        if slotted is None or not any(slotted.ranks):
            return
        if self._rescaled is not None:
            slotted.rescale_(y, self._rescaled)
        for groups in self._groups:
            groups.add_(slotted, y, x)


def _parts(slots: Sequence[int]) -> list[dict[int, list[int]]]:
    """The rows of each slot, slot -> rows, divided into those that share a batched product."""
    rows_of: defaultdict[int, list[int]] = defaultdict(list)
    for row, slot in enumerate(slots):
        if slot != NO_SLOT:
            rows_of[slot].append(row)
    few = {slot: rows for slot, rows in rows_of.items() if len(rows) <= MAX_FEW}
    many = [{slot: rows} for slot, rows in rows_of.items() if slot not in few]
    return [few, *many] if few else many
