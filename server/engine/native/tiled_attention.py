"""Attention over the blocks of the cache where they lie, for GPUs: one call a layer.

It is torch's FlexAttention (tile_program.py), compiled for any batch at once. Where that is not
possible, attention copies the blocks of each sequence in every step (kv_cache.py).

Shapes: as in tiles.py.
"""

import logging
import warnings
from collections.abc import Callable
from functools import cache as once

import torch
from torch import Tensor

from server.engine.native.block_pool import NULL_BLOCK
from server.engine.native.sequence import Sequence
from server.engine.native.step import Chunk
from server.engine.native.tiles import Tiles, make_tiles
from server.engine.request import Request

logger = logging.getLogger(__name__)

MIN_SIZE = 16  # the least head size and block size for a GPU's matrix instructions

Program = Callable[..., Tensor]


def attend_in_tiles(
    tiles: Tiles,
    cache: Tensor,
    query: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from each token to the positions of its sequence that the cache holds.

    Args:
        cache: [N, z, 2h, e], of one layer.
        query: [T, H, e].
        scaling: as in `kv_cache.attend`, and so are the others.

    Returns:
        [T, H, e].
    """
    block_size = cache.shape[1]
    keys, values = cache.flatten(0, 1).transpose(0, 1)[None].chunk(2, dim=1)
    in_tiles = query.index_select(0, tiles.rows).transpose(0, 1)[None]  # [1, H, P, e]
    _let_vary(in_tiles, keys, values, tiles)
    attended = _program()(
        in_tiles, keys, values, tiles, block_size, _scalar(scaling, cache.device), window, softcap
    )
    return attended[0].transpose(0, 1).index_select(0, tiles.places)


def _let_vary(query: Tensor, keys: Tensor, values: Tensor, tiles: Tiles) -> None:
    """Have the program compiled for any size of what differs from batch to batch."""
    varying = [(query, 2), (keys, 2), (values, 2), (tiles.positions, 0), (tiles.sequences, 0)]
    varying += [(tiles.ranks, 0), (tiles.ranks, 1), (tiles.num_blocks, 2)]
    varying += [(tiles.blocks, 2), (tiles.blocks, 3)]
    for tensor, dimension in varying:
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)


@once
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


@once
def _program() -> Program:
    """The attention of tiles, compiled at its first call."""
    from server.engine.native.tile_program import attend

    return torch.compile(attend, fullgraph=True)


def can_attend_in_tiles(cache: Tensor, num_heads: int, num_threads: int = 1) -> bool:
    """Whether a GPU attends in tiles: it compiles the program and runs it once.

    Args:
        cache: [L, N, z, 2h, e], of which the null block holds zeros.
        num_heads: H.
        num_threads: CPU threads of the steps; what was compiled for another number is not used.

    Returns:
        False on other devices, for heads and blocks that are too small, and, with a warning, where
        torch cannot compile (it needs Triton and a C compiler). Blocks are then copied in each
        step.
    """
    is_large_enough = min(cache.shape[2], cache.shape[4]) >= MIN_SIZE
    if cache.device.type != "cuda" or not is_large_enough:
        return False
    logger.info("compiling the attention for %s", torch.cuda.get_device_name(cache.device))
    own_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        try_tiles(cache, num_heads)
    except Exception as error:
        logger.warning("attention copies its blocks in each step: torch cannot compile: %s", error)
        return False
    finally:
        torch.set_num_threads(own_threads)
    return True


def try_tiles(cache: Tensor, num_heads: int) -> None:
    """Attend from one token to the null block. Raises whatever torch does if it cannot compile."""
    sequence = Sequence(Request("probe", prompt_ids=(0,)), 0)
    sequence.block_table = [NULL_BLOCK]
    tiles = make_tiles([Chunk(sequence, 0, 1)], cache)
    query = cache.new_zeros(1, num_heads, cache.shape[-1])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises TensorFloat-32, which rounds
        attend_in_tiles(tiles, cache[0], query, 1.0)
