"""Attention over the paged KV cache for transformers' modules, through their attention interface.

Only models that the decoder does not cover need it: it imports the code of all models' modules.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.engine.native.kv_cache import PagedKv, attend

ATTENTION = "crma_paged"


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
    """transformers' attention interface, with one token a row.

    Args:
        module: the attention module, which knows its layer.
        query: [T, H, 1, e].
        key: [T, h, 1, e], stored in the cache.
        value: [T, h, 1, e], likewise.
        paged: comes through the model's keyword arguments.

    Returns:
        [T, 1, H, e], and no attention weights.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    new = torch.cat((key, value), dim=1)
    paged.store(layer, new[:, :, 0])
    attended = attend(paged, layer, query[:, :, 0], scaling, sliding_window, softcap)
    return attended[:, None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
