"""Keys and values in blocks, and attention over them: for the decoder, and for transformers' models through their
attention interface.

A batch is T tokens, each a row of its own: all but attention looks at one token at a time, so sequences of any lengths,
chunks of prompts and single new tokens lie side by side without padding.

Shapes: L layers; N blocks of z tokens; T tokens of a batch; H query heads over h key-value heads, g = H / h; e head
size. A group is n sequences with s new tokens each and up to m blocks; p = m z positions.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.engine.native.block_pool import NULL_BLOCK
from server.engine.native.kernel import Kernel

ATTENTION = "crma_paged"


def make_cache(model: PreTrainedModel, num_blocks: int, block_size: int) -> Tensor:
    """[L, N, z, 2h, e], keys before values, of uninitialised memory but for the null block. What a sequence gets of it
    is made zero before its first use: a masked position still enters a product, and another's NaN · 0 is NaN."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, num_blocks, block_size, 2 * heads, size)
    cache = torch.empty(shape, dtype=model.dtype, device=model.device)
    cache[:, NULL_BLOCK] = 0
    return cache


@dataclass(frozen=True)
class AttentionGroup:
    """n sequences with s new tokens each.

    rows: where their n · s tokens lie in the batch, sequence by sequence. blocks [n · m]: theirs, sequence by sequence,
    padded with the null block. positions [n, s].
    """

    rows: slice
    blocks: Tensor
    positions: Tensor
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, keys: Tensor, window: int | None, repeats: int) -> Tensor:
        """[n, 1, s · repeats, p], added to scores: a token sees positions up to its own; with a window only the last
        of them. keys [.., p, e]."""
        if (known := self._masks.get((window, repeats))) is None:
            own = self.positions.repeat_interleave(repeats, dim=1)[:, None, :, None]
            other = torch.arange(keys.shape[-2], device=own.device)
            unseen = other > own if window is None else (other > own) | (other <= own - window)
            known = torch.zeros(unseen.shape, dtype=keys.dtype, device=own.device).masked_fill_(
                unseen, -torch.inf
            )
            self._masks[window, repeats] = known
        return known


@dataclass(frozen=True)
class PagedKv:
    """The cache [L, N, z, 2h, e] as one forward pass sees it: slots [T] say where each token's keys and values go.
    kernel: computes the attention of single tokens, if there is one."""

    cache: Tensor
    slots: Tensor
    groups: tuple[AttentionGroup, ...]
    kernel: Kernel | None = None

    def store(self, layer: int, new: Tensor) -> None:
        """Puts the keys and values [T, 2h, e] of the batch into the cache."""
        self.cache[layer].flatten(0, 1).index_copy_(0, self.slots, new)


def attend(
    paged: PagedKv,
    layer: int,
    query: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query [T, H, e] -> [T, H, e], over what the cache has."""
    cache = paged.cache[layer]
    (_, H, e), h = query.shape, cache.shape[-2] // 2
    output = query.new_empty(query.shape)
    for group in paged.groups:
        n, s = group.positions.shape
        if paged.kernel is not None and s == 1 and softcap is None and query[0].is_contiguous():
            # To cut rows out, where they are all, would take as long as a short sequence.
            q, out = (query, output) if n == len(query) else (query[group.rows], output[group.rows])
            paged.kernel.attend(
                q, cache, group.blocks.view(n, -1), group.positions, out, scaling, window
            )
            continue
        # The g query heads of a key-value head are g more queries of it: no copies.
        q = (
            query[group.rows]
            .view(n, s, h, H // h, e)
            .permute(0, 2, 1, 3, 4)
            .reshape(n, h, s * H // h, e)
        )
        # index_select copies block by block; indexing with a table takes five times as long.
        k, v = (
            cache.index_select(0, group.blocks)
            .view(n, -1, 2 * h, e)
            .transpose(1, 2)
            .chunk(2, dim=1)
        )
        mask = group.mask(k, window, H // h)
        if softcap is None:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        else:  # a soft cap (Gemma 2) on the scores; the fused attention has none
            scores = torch.tanh(q @ k.mT * scaling / softcap) * softcap + mask
            out = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        output[group.rows] = out.view(n, h, s, H // h, e).transpose(1, 2).reshape(n * s, H, e)
    return output


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float,
    paged: PagedKv,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [T, H, 1, e], key and value [T, h, 1, e] -> [T, 1, H, e]. `paged` comes through
    the model's keyword arguments."""
    assert isinstance(module.layer_idx, int)
    paged.store(module.layer_idx, torch.cat((key, value), dim=1)[:, :, 0])
    return attend(paged, module.layer_idx, query[:, :, 0], scaling, sliding_window, softcap)[
        :, None
    ], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
