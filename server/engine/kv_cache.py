"""Keys and values of running sequences: one slot a sequence, read and written through transformers' cache interface.

Shapes: L layers; slots; h key-value heads; p positions; e head size; b rows and s new tokens of one forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROWTH = 256  # positions


class KvCache:
    """Per layer, keys and values [slots, h, p, e]; p grows in steps as sequences do.

    New memory is zero, never uninitialised: a masked position still enters a product, and 0 · NaN is NaN. The last
    position of every slot is scratch, where padding is written.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer with room for `num_positions` and the scratch position.

        Args:
            like: [b, h, s, e] new keys: they decide heads, size, dtype and device.
        """
        keys, values = self._layers.get(index, (None, None))
        if keys is None or values is None or keys.shape[2] <= num_positions:
            room = (num_positions // GROWTH + 1) * GROWTH + 1
            keys, values = (self._grown(old, like, room) for old in (keys, values))
            self._layers[index] = keys, values
        return keys, values

    def clear(self, slots: list[int]) -> None:
        """Zero what is not a number: the next sequence of a slot would mask it, and 0 · NaN is NaN."""
        for keys, values in self._layers.values():
            keys[slots] = 0
            values[slots] = 0

    def _grown(self, old: Tensor | None, like: Tensor, room: int) -> Tensor:
        new = like.new_zeros(self.num_slots, like.shape[1], room, like.shape[3])
        if old is not None:
            new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
        return new

    def view(self, slots: Tensor, positions: Tensor) -> BatchView:
        """The cache as one forward pass sees it: slots [b], positions [b, s] (-1 = padding)."""
        return BatchView(self, slots, positions)


class BatchView:
    """What a transformers model takes for its `cache`: it only ever calls `update` (and asks for no length, because
    positions and the mask are given)."""

    def __init__(self, kv: KvCache, slots: Tensor, positions: Tensor) -> None:
        self.kv = kv
        self.slots = slots
        self.positions = positions
        self.num_positions = int(positions.max()) + 1

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [b, h, s, e] at this pass's positions; return everything up to the longest row: [b, h, p, e]."""
        keys, values = self.kv.layer(layer_idx, key, self.num_positions)
        rows = self.slots[:, None]
        keys[rows, :, self.positions] = key.transpose(1, 2)
        values[rows, :, self.positions] = value.transpose(1, 2)
        return keys[self.slots, :, : self.num_positions], values[self.slots, :, : self.num_positions]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused where position ids are given; 0 keeps the model from adding anything to them."""
        return 0 * layer_idx


def attention_mask(positions: Tensor, num_positions: int, window: int | None) -> Tensor:
    """Bool [b, 1, s, p]: a token sees positions up to its own, and with a window only the last `window` of them.

    Padding (position -1) sees position 0, so that no row of a softmax is empty.
    """
    own = positions.clamp(min=0)[:, None, :, None]
    other = torch.arange(num_positions, device=positions.device)
    visible = other <= own
    return visible if window is None else visible & (other > own - window)
