"""The attention of tiles, as torch's FlexAttention: what tiled_attention.py compiles.

A module of its own, because importing FlexAttention loads torch's compiler.

Shapes: as in tiles.py.
"""

from torch import Tensor, tanh
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from server.engine.native.tiles import ROWS, Tiles


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tiles,
    block_size: int,
    scaling: Tensor,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """query [1, H, P, e], keys and values [1, h, N · z, e] -> [1, H, P, e].

    Args:
        scaling: [], of the scores; a tensor, because torch compiles for each value of a number.
        window: as in `kv_cache.attend`, and so are the others.

    Returns:
        Rows of empty tiles are undefined.
    """
    ranks, sequences, positions = tiles.ranks, tiles.sequences, tiles.positions

    def is_visible(_batch: Tensor, _head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        rank = ranks[sequences[row // ROWS], slot // block_size]
        position = rank * block_size + slot % block_size
        visible = (rank >= 0) & (position <= positions[row])
        if window is not None:
            visible = visible & (position > positions[row] - window)
        return visible

    def scaled(score: Tensor, _batch: Tensor, _head: Tensor, _row: Tensor, _slot: Tensor) -> Tensor:
        score = score * scaling
        return score if softcap is None else softcap * tanh(score / softcap)

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
        score_mod=scaled,
        block_mask=mask,
        scale=1.0,
        enable_gqa=query.shape[1] != keys.shape[1],
        kernel_options={"BLOCK_M": ROWS, "BLOCK_N": block_size},
    )
    assert isinstance(attended, Tensor)
    return attended
