"""Keys and values in blocks, and attention over them.

The decoder calls `attend`; transformers' models come through `module_attention.py`.

A batch is T tokens, each a row of its own. All operations but attention look at one token at a
time, so sequences of any length, chunks of prompts and single new tokens share a batch without
padding.

The cache is [L, N, z, 2h, e]: the keys of a position lie before its values. Where the kernel
computes, nothing else writes or reads the numbers of a block, and they have the order in which it
reads them: head by head the keys turned over, [e, z], then the values, [z, e] (cpp/cached_kv.h).
Then the shape only says how large the cache is.

Shapes: L layers; N blocks of z positions; T tokens of a batch; H query heads over h key-value
heads, g = H / h; e head size. A group is n sequences with s new tokens each and up to m blocks;
p = m · z positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.engine.native.block_pool import NULL_BLOCK
from server.engine.native.huge_pages import HugePages
from server.engine.native.kernel import Kernel
from server.engine.native.tiled_attention import attend_in_tiles
from server.engine.native.tiles import Tiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_cache(model: PreTrainedModel, num_blocks: int, block_size: int) -> Tensor:
    """Allocate a cache [L, N, z, 2h, e].

    Only the null block is zero. Where torch attends, the caller must zero a sequence's blocks
    before their first use: masked positions still enter a product, where a NaN left in memory would
    spread (NaN · 0 = NaN).
    """
    shape = _cache_shape(model, num_blocks, block_size)
    if model.device.type == "cpu":
        cache = HugePages().empty(shape, model.dtype)
    else:
        cache = torch.empty(shape, dtype=model.dtype, device=model.device)
    cache[:, NULL_BLOCK] = 0
    return cache


def block_bytes(model: PreTrainedModel, block_size: int) -> int:
    """What one more block of a cache takes."""
    return math.prod(_cache_shape(model, 1, block_size)) * model.dtype.itemsize


def _cache_shape(model: PreTrainedModel, num_blocks: int, block_size: int) -> tuple[int, ...]:
    config = model.config
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None)
    if not head_size:
        head_size = config.hidden_size // config.num_attention_heads
    return (config.num_hidden_layers, num_blocks, block_size, 2 * num_kv_heads, head_size)


@dataclass(frozen=True)
class AttentionGroup:
    """n sequences with s new tokens each.

    Attributes:
        rows: the n · s rows of the batch that hold their tokens, sequence by sequence.
        blocks: [n · m], their blocks, sequence by sequence, padded with the null block.
        positions: [n, s].
    """

    rows: slice
    blocks: Tensor
    positions: Tensor
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, keys: Tensor, window: int | None, repeats: int) -> Tensor:
        """The causal mask, to be added to scores; made once and kept for the other layers.

        Args:
            keys: [.., p, e]; their number and dtype count.
            window: how many positions a token sees, the last ones; None: all up to its own.
            repeats: how many queries in a row belong to one token.

        Returns:
            [n, 1, s · repeats, p], 0 or minus infinity.
        """
        known = self._masks.get((window, repeats))
        if known is None:
            own = self.positions.repeat_interleave(repeats, dim=1)[:, None, :, None]
            other = torch.arange(keys.shape[-2], device=own.device)
            hidden = other > own
            if window is not None:
                hidden |= other <= own - window
            zeros = torch.zeros(hidden.shape, dtype=keys.dtype, device=own.device)
            known = zeros.masked_fill_(hidden, -torch.inf)
            self._masks[window, repeats] = known
        return known


@dataclass(frozen=True)
class PagedKv:
    """The cache as one forward pass sees it.

    Attributes:
        cache: [L, N, z, 2h, e], in the kernel's order if it computes.
        slots: [T], the place in the cache of each token's keys and values, of N · z.
        groups: together all rows of the batch, unless it is in tiles.
        kernel: stores and attends; None: torch does.
        tiles: the batch in tiles, which attend in one call; None: its groups attend.
    """

    cache: Tensor
    slots: Tensor
    groups: tuple[AttentionGroup, ...]
    kernel: Kernel | None = None
    tiles: Tiles | None = None

    def store(self, layer: int, new: Tensor) -> None:
        """Write the batch's keys and values [T, 2h, e] to the cache."""
        if self.kernel is not None:
            self.kernel.store_kv(new.contiguous(), self.cache[layer], self.slots)
            return
        self.cache[layer].flatten(0, 1).index_copy_(0, self.slots, new)


def attend(
    paged: PagedKv,
    layer: int,
    query: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from each token to the positions of its sequence that the cache holds.

    Args:
        query: [T, H, e].
        scaling: of the scores.
        window: how many positions a token sees, the last ones; None: all up to its own.
        softcap: c bounds a score x to c · tanh(x / c), as in Gemma 2; None: no bound.

    Returns:
        [T, H, e].
    """
    cache = paged.cache[layer]
    if paged.tiles is not None:
        return attend_in_tiles(paged.tiles, cache, query, scaling, window, softcap)
    if paged.kernel is not None and not query[0].is_contiguous():
        query = query.contiguous()
    output = query.new_empty(query.shape)
    for group in paged.groups:
        own, out = query, output
        # Else skip the slicing: it takes as long as a short sequence's attention.
        if group.positions.numel() < len(query):
            own, out = query[group.rows], output[group.rows]
        if paged.kernel is None:
            out.copy_(_attend_gathered(group, cache, own, scaling, window, softcap))
            continue
        blocks = group.blocks.view(len(group.positions), -1)
        paged.kernel.attend(own, cache, blocks, group.positions, out, scaling, window, softcap)
    return output


def _attend_gathered(
    group: AttentionGroup,
    cache: Tensor,
    query: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a group over a copy of its blocks: cache [N, z, 2h, e], query [n · s, H, e].

    Returns:
        [n · s, H, e].
    """
    n, s = group.positions.shape
    _, H, e = query.shape
    h = cache.shape[-2] // 2
    g = H // h
    # The g query heads of a key-value head become g more queries of it: keys are not repeated.
    q = query.view(n, s, h, g, e).permute(0, 2, 1, 3, 4).reshape(n, h, s * g, e)
    # index_select copies block by block; indexing with a table takes five times as long.
    blocks = cache.index_select(0, group.blocks)
    k, v = blocks.view(n, -1, 2 * h, e).transpose(1, 2).chunk(2, dim=1)
    mask = group.mask(k, window, g)
    if softcap is None:
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:  # torch's fused attention has no soft cap
        scores = torch.tanh(q @ k.mT * scaling / softcap) * softcap + mask
        attended = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    return attended.view(n, h, s, g, e).transpose(1, 2).reshape(n * s, H, e)
