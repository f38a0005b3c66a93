"""Logits -> the next token of every row, and the log-probabilities of tokens.

The draw is the inverse of the cumulative distribution in the order of token ids, at one uniform number of the row's own
generator. Probabilities are whole numbers, 2^32 for the likeliest token. Sums of them are exact in float64 (below 2^53:
up to 2^21 token ids): no order of summation (batched or alone, another device) moves a border, and no draw falls on a
token that was left out. A token 2^33 times less likely than the likeliest is never drawn.

To sort a vocabulary costs some twenty times what finding its 128 largest does. Only top-k and top-p need an order, and
they take it from as few candidates as settle them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.request import SamplingParams, TokenLogprob

LIKELIEST = 2.0**32
ROOM_FOR_EQUALS = 64


class SamplingRow(NamedTuple):
    """What belongs to one row of logits. Only a sampled row (temperature above 0) draws from its CPU generator."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    generator: torch.Generator


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token a row: penalties, then the largest (temperature 0; lowest id among equals), or temperature, top-k,
    min-p, top-p and a draw. Top-k keeps exactly k, of equals the lowest ids; top-p keeps the token that crosses it.

    Args:
        logits: [b, vocab] fp32, left as it is; no NaN, no +inf, and a finite one in each row.
        rows: one a row of logits. No row changes what another gets.
    """
    scores = _penalised(logits, rows)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    # max: argmax takes three times as long. Both give the first of equals.
    tokens: list[int] = (
        scores.max(-1).indices.tolist() if len(drawn) < len(rows) else [0] * len(rows)
    )
    if drawn:
        for i, token in zip(drawn, _draw(scores[drawn], [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """Of each row of logits [b, vocab] fp32 its token's log-probability and its num_top most probable tokens.

    Under the unmodified distribution. Of equals the lower ids come first (of more than 64 equals, some do).
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(
        -1, torch.tensor(token_ids, dtype=torch.long, device=logits.device)[:, None]
    )
    most = max(num_top, default=0)
    if not most:
        return [TokenLogprob(value) for value in chosen[:, 0].tolist()]
    ids = _ranked(logits, most + ROOM_FOR_EQUALS)[:, :most]
    pairs = zip(ids.tolist(), logprobs.gather(-1, ids).tolist(), strict=True)
    tops = [tuple(zip(*pair, strict=True))[:k] for pair, k in zip(pairs, num_top, strict=True)]
    return [*map(TokenLogprob, chosen[:, 0].tolist(), tops)]


def _penalised(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """[b, vocab] fp32: logits itself where no row has a penalty. Repetition first; computed in float64."""
    penalties = [
        (r.params.repetition_penalty, r.params.presence_penalty, r.params.frequency_penalty)
        for r in rows
    ]
    counts = [  # of the output; what is only in the prompt has 0
        {} if each == (1, 0, 0) else {**dict.fromkeys(row.prompt_ids, 0), **Counter(row.output_ids)}
        for each, row in zip(penalties, rows, strict=True)
    ]
    if not any(counts):
        return logits
    row = torch.arange(len(rows)).repeat_interleave(torch.tensor([*map(len, counts)]))
    repetition, presence, frequency = (
        torch.tensor(penalties, dtype=torch.float64)[row].to(logits.device).unbind(-1)
    )
    count = torch.tensor([*chain.from_iterable(c.values() for c in counts)], device=logits.device)
    cells = (
        row.to(logits.device),
        torch.tensor([*chain.from_iterable(counts)], device=logits.device),
    )
    old = logits[cells].double()
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= torch.where(count > 0, presence + frequency * count, 0.0)
    # Not beyond the largest fp32: an infinite logit would make every probability NaN.
    return logits.index_put(cells, new.clamp_(max=torch.finfo(torch.float32).max).float())


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token a sampled row; scores [b, vocab] fp32 are penalised."""

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([*values], dtype=torch.float64, device=scores.device)[:, None]

    params = [row.params for row in rows]
    masses = scores.double()
    # Against the largest first: a tiny temperature then gives -inf, never inf, and no NaN.
    masses.sub_(masses.amax(-1, keepdim=True)).div_(column(p.temperature for p in params)).exp_()
    if any(p.min_p for p in params):
        masses.masked_fill_(masses < column(p.min_p for p in params), 0.0)
    masses.mul_(LIKELIEST).round_()
    cut = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    if cut:
        # A k over the vocabulary keeps all of it, and may be an integer that no float can hold.
        vocab = scores.shape[-1]
        top_k = column(min(params[i].top_k or vocab, vocab) for i in cut)
        top_p = column(params[i].top_p for i in cut)
        masses[cut] = _truncated(masses[cut], scores[cut], top_k, top_p)
    reached = masses.cumsum_(-1)
    # In (0, 1]: the first sum that is not below the draw belongs to a token with a mass, and there always is one.
    draws = column(
        1 - torch.rand((), dtype=torch.float64, generator=row.generator).item() for row in rows
    )
    return torch.searchsorted(reached, draws * reached[:, -1:])[:, 0].tolist()


def _truncated(
    masses: Tensor, scores: Tensor, top_k: Tensor, top_p: Tensor, num_candidates: int = 128
) -> Tensor:
    """Masses [b, vocab] with a zero for what top-k, and top-p of what that left, leave out; top_k, top_p [b, 1]."""
    vocab = scores.shape[-1]
    ids = _ranked(scores, num_candidates)
    kept = masses.gather(-1, ids)
    kept[torch.arange(ids.shape[-1], device=ids.device) >= top_k] = 0.0
    total = torch.where(top_k < vocab, kept.sum(-1, keepdim=True), masses.sum(-1, keepdim=True))
    kept *= kept.cumsum(-1) - kept < top_p * total
    result = torch.zeros_like(masses).scatter_(-1, ids, kept)
    if num_candidates < vocab:
        # The last candidate may have equals outside, and a larger k has tokens there.
        is_last = scores.gather(-1, ids) == scores.gather(-1, ids[:, -1:])
        is_open = ((kept > 0) & is_last).any(-1) | ((top_k > num_candidates) & (top_k < vocab))[
            :, 0
        ]
        if is_open.any():
            rest = masses[is_open], scores[is_open], top_k[is_open], top_p[is_open]
            result[is_open] = _truncated(*rest, 2048 if num_candidates < 2048 else vocab)
    return result


def _ranked(scores: Tensor, width: int) -> Tensor:
    """[b, width] ids, the largest score first, of equals the lowest id; those equal to the last may be any of them.

    A width over the vocabulary is the vocabulary.
    """
    if width >= scores.shape[-1]:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ids = scores.topk(width, sorted=False).indices.sort(-1).values
    return ids.gather(
        -1, torch.sort(scores.gather(-1, ids), dim=-1, descending=True, stable=True).indices
    )
