"""A scheduled step -> the tensors of one forward pass. Shapes as in kv_cache.py; T tokens, one a row."""

from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from crma.core.selection import AdapterSelection
from server.engine.native.block_pool import NULL_BLOCK
from server.engine.native.kv_cache import AttentionGroup, PagedKv
from server.engine.native.scheduler import Chunk, Step


@dataclass(frozen=True)
class Batch:
    """input_ids, positions [T]; paged: where their keys and values go; selections: one a token; the first num_single
    tokens are of a sequence each; logit_rows: the tokens whose logits are needed, chunk after chunk, and num_logits of
    each chunk."""

    chunks: list[Chunk]
    input_ids: Tensor
    positions: Tensor
    paged: PagedKv
    selections: list[AdapterSelection]
    num_single: int
    logit_rows: Tensor
    num_logits: list[int]


def build_batch(step: Step, cache: Tensor) -> Batch:
    """Single tokens first, the short sequences' before the long ones'; then chunks, those of an adapter together."""
    device, size = cache.device, cache.shape[2]
    parts = [
        sorted((c for c in step.chunks if c.count == 1), key=lambda c: c.stop),
        sorted(
            (c for c in step.chunks if c.count > 1),
            key=lambda c: c.sequence.request.selection.task_digest or "",
        ),
    ]
    chunks = [*parts[0], *parts[1]]
    tokens = [
        (chunk.sequence, position)
        for chunk in chunks
        for position in range(chunk.start, chunk.stop)
    ]
    input_ids = torch.tensor([s.token_ids[p] for s, p in tokens], device=device)
    positions = torch.tensor([p for _, p in tokens], device=device)
    slots = torch.tensor(
        [s.block_table[p // size] * size + p % size for s, p in tokens], device=device
    )
    # No sequence in a group has over twice the blocks of another: what is padded is read, too.
    together = [
        list(group)
        for _, group in groupby(parts[0], key=lambda c: (-(-c.stop // size)).bit_length())
    ]
    groups = _groups([*together, *([chunk] for chunk in parts[1])], size, device)
    num_logits = [c.num_logits for c in chunks]
    ends = zip(accumulate(c.count for c in chunks), num_logits, strict=True)
    logit_rows = torch.tensor(
        [row for end, wanted in ends for row in range(end - wanted, end)], dtype=torch.long
    )
    selections = [s.request.selection for s, _ in tokens]
    paged = PagedKv(cache, slots, groups)
    return Batch(
        chunks,
        input_ids,
        positions,
        paged,
        selections,
        len(parts[0]),
        logit_rows.to(device),
        num_logits,
    )


def _groups(
    parts: list[list[Chunk]], size: int, device: torch.device
) -> tuple[AttentionGroup, ...]:
    """One for each list of chunks, which have the same number of tokens."""
    groups, first = [], 0
    for part in parts:
        tables = [c.sequence.block_table[: -(-c.stop // size)] for c in part]
        width = max(map(len, tables))
        rows = slice(first, first := first + len(part) * part[0].count)
        blocks = torch.tensor(
            [b for t in tables for b in t + [NULL_BLOCK] * (width - len(t))], device=device
        )
        positions = torch.tensor([range(c.start, c.stop) for c in part], device=device)
        groups.append(AttentionGroup(rows, blocks, positions))
    return tuple(groups)
