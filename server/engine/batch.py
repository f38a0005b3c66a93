"""A scheduled step -> the tensors of one forward pass. Shapes as in kv_cache.py; T tokens, one a row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crma.selection import AdapterSelection
from server.engine.block_pool import NULL_BLOCK
from server.engine.kv_cache import AttentionGroup, KvCache, PagedKv
from server.engine.scheduler import Chunk, Step


@dataclass(frozen=True)
class Batch:
    """input_ids, positions [T, 1]; paged: where their keys and values go; selections: one a token; logit_rows: the
    tokens whose logits are needed, chunk after chunk, and num_logits of each chunk."""

    chunks: list[Chunk]
    input_ids: Tensor
    positions: Tensor
    paged: PagedKv
    selections: list[AdapterSelection]
    logit_rows: list[int]
    num_logits: list[int]


def build_batch(step: Step, cache: KvCache) -> Batch:
    """Single tokens first, chunks after them; both by adapter, so that an adapter's rows lie together."""
    chunks = sorted(step.chunks, key=lambda c: (c.count > 1, c.sequence.request.selection.task_digest or ""))
    device, size = cache.blocks.device, cache.blocks.shape[3]
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    selections: list[AdapterSelection] = []
    logit_rows: list[int] = []
    num_logits: list[int] = []
    for chunk in chunks:
        sequence, start, count = chunk.sequence, chunk.start, chunk.count
        first, stop = len(input_ids), start + count
        input_ids += sequence.token_ids[start:stop]
        positions += range(start, stop)
        slots += [sequence.block_table[p // size] * size + p % size for p in range(start, stop)]
        selections += [sequence.request.selection] * count
        wanted = count if sequence.wants_prompt_logprobs else int(stop == len(sequence.token_ids))
        logit_rows += range(first + count - wanted, first + count)
        num_logits.append(wanted)
    return Batch(
        chunks,
        torch.tensor(input_ids, device=device)[:, None],
        torch.tensor(positions, device=device)[:, None],
        PagedKv(cache, torch.tensor(slots, device=device), _groups(chunks, size, device)),
        selections,
        logit_rows,
        num_logits,
    )


def _groups(chunks: list[Chunk], size: int, device: torch.device) -> tuple[AttentionGroup, ...]:
    """All single tokens together, each longer chunk by itself."""
    num_single = sum(chunk.count == 1 for chunk in chunks)
    parts = [chunks[:num_single]] * (num_single > 0) + [[chunk] for chunk in chunks[num_single:]]
    groups, first = [], 0
    for part in parts:
        tables = [c.sequence.block_table[: -(-(c.start + c.count) // size)] for c in part]
        width = max(map(len, tables))
        groups.append(
            AttentionGroup(
                slice(first, first + len(part) * part[0].count),
                torch.tensor([b for t in tables for b in t + [NULL_BLOCK] * (width - len(t))], device=device),
                torch.tensor([range(c.start, c.start + c.count) for c in part], device=device),
            )
        )
        first = groups[-1].rows.stop
    return tuple(groups)
