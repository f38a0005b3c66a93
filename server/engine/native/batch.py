"""The tensors of one forward pass, built from a planned step.

Shapes are those of kv_cache.py: T tokens in the batch, each in a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from torch import Tensor

from crma.core.selection import AdapterSelection
from server.engine.native.block_pool import NULL_BLOCK
from server.engine.native.kv_cache import AttentionGroup, PagedKv
from server.engine.native.step import Chunk, Step
from server.engine.native.tiles import make_tiles


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass.

    Attributes:
        chunks: the step's chunks, in the order in which their tokens lie in the batch.
        input_ids: [T] token ids.
        positions: [T] their positions in their sequences.
        num_positions: they lie below it.
        paged: the KV cache, and where each token's keys and values go in it.
        selections: the adapters of each token.
        logit_rows: [rows] the tokens whose logits are needed, chunk after chunk; None: all.
        num_logits: how many of those each chunk has.
    """

    chunks: list[Chunk]
    input_ids: Tensor
    positions: Tensor
    num_positions: int
    paged: PagedKv
    selections: list[AdapterSelection]
    logit_rows: Tensor | None
    num_logits: list[int]


def build_batch(step: Step, cache: Tensor, *, in_tiles: bool = False) -> Batch:
    """Lay the tokens of a step out in one batch.

    Single tokens come first, those of short sequences before those of long ones. Longer chunks
    follow, those of one task adapter side by side.

    Args:
        step: at least one chunk.
        cache: [L, N, z, 2h, e]; its device is the batch's.
        in_tiles: how it attends: in tiles, or in groups.
    """
    device = cache.device
    block_size = cache.shape[2]
    singles = [chunk for chunk in step.chunks if chunk.count == 1]
    singles.sort(key=lambda chunk: chunk.stop)
    longer = [chunk for chunk in step.chunks if chunk.count > 1]
    longer.sort(key=lambda chunk: chunk.sequence.request.selection.task_digest or "")
    chunks = singles + longer
    num_logits = [chunk.num_logits for chunk in chunks]

    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    selections: list[AdapterSelection] = []
    logit_rows: list[int] = []
    for chunk, num_rows in zip(chunks, num_logits, strict=True):
        sequence = chunk.sequence
        input_ids += sequence.token_ids[chunk.start : chunk.stop]
        positions += range(chunk.start, chunk.stop)
        slots += _slots(chunk, block_size)
        selections += [sequence.request.selection] * chunk.count
        logit_rows += range(len(input_ids) - num_rows, len(input_ids))

    members = [] if in_tiles else _members(singles, longer, block_size)
    tables = [_tables(chunks_of_group, block_size) for chunks_of_group in members]
    tiles = make_tiles(chunks, cache) if in_tiles else None
    tensors = _tensors([input_ids, positions, slots, logit_rows, *tables], device)
    of_ids, of_positions, of_slots, of_logits, *of_tables = tensors
    groups = _groups(members, of_positions, of_tables)
    return Batch(
        chunks,
        of_ids,
        of_positions,
        max(chunk.stop for chunk in chunks),
        PagedKv(cache, of_slots, groups, tiles=tiles),
        selections,
        None if len(logit_rows) == len(input_ids) else of_logits,
        num_logits,
    )


def _tensors(lists: Sequence[list[int]], device: torch.device) -> Sequence[Tensor]:
    """Lists as tensors: parts of one, which is sent to the device at once."""
    together = np.array(list(chain.from_iterable(lists)), dtype=np.int64)  # sooner than torch does
    sizes = [len(each) for each in lists]
    return torch.from_numpy(together).to(device).split_with_sizes(sizes)


def _slots(chunk: Chunk, block_size: int) -> list[int]:
    """Where the cache keeps each token of a chunk: its block's first slot, plus its place there."""
    table = chunk.sequence.block_table
    positions = range(chunk.start, chunk.stop)
    return [table[p // block_size] * block_size + p % block_size for p in positions]


def _members(singles: list[Chunk], longer: list[Chunk], block_size: int) -> list[list[Chunk]]:
    """Divide a batch into groups of sequences that attend together.

    Each longer chunk is a group. Single tokens, which are sorted by the length of their sequences,
    form groups in which no sequence has more than twice the blocks of another: attention also reads
    the padding.
    """
    by_magnitude = groupby(singles, key=lambda chunk: _num_blocks(chunk, block_size).bit_length())
    members = [list(group) for _, group in by_magnitude]
    return members + [[chunk] for chunk in longer]


def _tables(chunks: list[Chunk], block_size: int) -> list[int]:
    """The blocks of a group's sequences, one after the other, all padded to the same number."""
    tables = [c.sequence.block_table[: _num_blocks(c, block_size)] for c in chunks]
    width = max(len(table) for table in tables)
    blocks: list[int] = []
    for table in tables:
        blocks += table
        blocks += [NULL_BLOCK] * (width - len(table))
    return blocks


def _groups(
    members: Sequence[list[Chunk]], positions: Tensor, tables: Sequence[Tensor]
) -> tuple[AttentionGroup, ...]:
    """The groups of a batch, in the order in which their tokens lie there.

    Args:
        members: the chunks of each group, which all have the same number of tokens.
        positions: [T], of the batch.
        tables: [n · m], of each group.
    """
    groups = []
    first_row = 0
    for chunks, blocks in zip(members, tables, strict=True):
        rows = slice(first_row, first_row + len(chunks) * chunks[0].count)
        groups.append(AttentionGroup(rows, blocks, positions[rows].view(len(chunks), -1)))
        first_row = rows.stop
    return tuple(groups)


def _num_blocks(chunk: Chunk, block_size: int) -> int:
    """How many blocks hold its sequence up to the end of the chunk."""
    return -(-chunk.stop // block_size)
