"""A scheduled step -> the tensors of one forward pass. Shapes as in kv_cache.py; T tokens, one a row."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from crma.selection import AdapterSelection
from server.engine.block_pool import NULL_BLOCK
from server.engine.kv_cache import AttentionGroup, PagedKv
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


def build_batch(step: Step, cache: Tensor) -> Batch:
    """Single tokens first, chunks after them; both by adapter, so that an adapter's rows lie together."""
    chunks = sorted(step.chunks, key=lambda c: (c.count > 1, c.sequence.request.selection.task_digest or ""))
    device, size = cache.device, cache.shape[3]
    tokens = [(chunk.sequence, position) for chunk in chunks for position in range(chunk.start, chunk.stop)]
    input_ids = torch.tensor([s.token_ids[p] for s, p in tokens], device=device)
    positions = torch.tensor([p for _, p in tokens], device=device)
    slots = torch.tensor([s.block_table[p // size] * size + p % size for s, p in tokens], device=device)
    paged = PagedKv(cache, slots, _groups(chunks, size, device))
    num_logits = [c.count if c.sequence.wants_prompt_logprobs else int(c.samples) for c in chunks]
    ends = zip(accumulate(c.count for c in chunks), num_logits, strict=True)
    logit_rows = [row for end, wanted in ends for row in range(end - wanted, end)]
    selections = [s.request.selection for s, _ in tokens]
    return Batch(chunks, input_ids[:, None], positions[:, None], paged, selections, logit_rows, num_logits)


def _groups(chunks: list[Chunk], size: int, device: torch.device) -> tuple[AttentionGroup, ...]:
    """All single tokens together, each longer chunk by itself."""
    num_single = sum(chunk.count == 1 for chunk in chunks)
    parts = [chunks[:num_single]] * (num_single > 0) + [[chunk] for chunk in chunks[num_single:]]
    groups, first = [], 0
    for part in parts:
        tables = [c.sequence.block_table[: -(-c.stop // size)] for c in part]
        width = max(map(len, tables))
        rows = slice(first, first := first + len(part) * part[0].count)
        blocks = torch.tensor([b for t in tables for b in t + [NULL_BLOCK] * (width - len(t))], device=device)
        positions = torch.tensor([range(c.start, c.stop) for c in part], device=device)
        groups.append(AttentionGroup(rows, blocks, positions))
    return tuple(groups)
