"""The attention of tiles, as torch's FlexAttention: what tiled_attention.py compiles.

A module of its own, because importing FlexAttention loads torch's compiler.

Shapes: as in tiles.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from server.engine.native.tiles import ROWS, Tiles

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tiles,
    block_size: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """query [1, H, P, e], keys and values [1, h, N · z, e] -> [1, H, P, e].

    Rows of empty tiles are undefined.
    """

    def is_visible(_batch: Tensor, _head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        rank = tiles.ranks[tiles.sequences[row // ROWS], slot // block_size]
        position = rank * block_size + slot % block_size
        visible = (rank >= 0) & (position <= tiles.positions[row])
        if window is not None:
            visible = visible & (position > tiles.positions[row] - window)
        return visible

    mask = BlockMask(
        seq_lengths=(query.shape[2], keys.shape[2]),
        kv_num_blocks=tiles.num_blocks,
        kv_indices=tiles.blocks,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(ROWS, block_size),
        mask_mod=is_visible,
    )
    attended = flex_attention(
        query,
        keys,
        values,
        score_mod=_cap(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
        kernel_options={"BLOCK_M": ROWS, "BLOCK_N": block_size},
    )
    assert isinstance(attended, Tensor)
    return attended


def _cap(softcap: float | None) -> Score | None:
    """How scores are bounded; None: they are not."""
    if softcap is None:
        return None

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _row: Tensor, _slot: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
