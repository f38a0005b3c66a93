"""The scores of all rows of a batch at once, as a device does best: tokens, and the largest scores.

Sorting a vocabulary takes about twenty times as long as finding its 128 largest scores. Only top-k
and top-p need an order; they start with few candidates, and take more only where those do not
settle the matter.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from server.engine.native.score_row import MOST_PROBABLE_MASS
from server.engine.request import SamplingParams

ROOM_FOR_TIES = 64
NUM_CANDIDATES = (128, 2048)  # for top-k and top-p, before the whole vocabulary is sorted


def choose(scores: Tensor, params: Sequence[SamplingParams], points: Sequence[float]) -> list[int]:
    """Choose one token for each row, as `ScoreRow.choose` does.

    Args:
        scores: [b, vocab] fp32, not changed; no NaN, no +inf, and a finite value in each row.
        params: one for each row.
        points: likewise; in (0, 1].
    """
    sampled = [i for i, each in enumerate(params) if each.temperature > 0]
    if len(sampled) == len(params):
        return _draw(scores, params, points)
    # max returns the first of ties, as argmax does, in a third of the time.
    tokens: list[int] = scores.max(-1).indices.tolist()
    if sampled:
        own_params = [params[i] for i in sampled]
        drawn = _draw(scores[sampled], own_params, [points[i] for i in sampled])
        for i, token in zip(sampled, drawn, strict=True):
            tokens[i] = token
    return tokens


def ranked(scores: Tensor, width: int) -> Tensor:
    """The ids of the largest scores of each row: the largest first, of ties the lowest id.

    Where more than 64 tie with the last one, any of them may be in the result.

    Args:
        scores: [b, vocab].
        width: how many; at most the vocabulary is returned.
    """
    return _ranked(scores, width + ROOM_FOR_TIES)[:, :width]


def _draw(scores: Tensor, params: Sequence[SamplingParams], points: Sequence[float]) -> list[int]:
    """As `choose`, where every row has a temperature above 0."""
    device = scores.device
    masses = scores.double()
    # Subtract the largest score first: a tiny temperature then gives -inf, never +inf or NaN.
    masses.sub_(masses.amax(-1, keepdim=True))
    masses.div_(_column((p.temperature for p in params), device)).exp_()
    if any(p.min_p for p in params):
        masses.masked_fill_(masses < _column((p.min_p for p in params), device), 0.0)
    masses.mul_(MOST_PROBABLE_MASS).round_()
    truncated = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    if truncated:
        # A top_k beyond the vocabulary keeps all of it. It may be an integer that no float holds.
        vocab = scores.shape[-1]
        top_k = _column((min(params[i].top_k or vocab, vocab) for i in truncated), device)
        top_p = _column((params[i].top_p for i in truncated), device)
        masses[truncated] = _truncated(masses[truncated], scores[truncated], top_k, top_p)
    sums = masses.cumsum_(-1)
    # A point is above 0: the first sum that reaches its share belongs to a token with a mass.
    return torch.searchsorted(sums, _column(points, device) * sums[:, -1:])[:, 0].tolist()


def _column(values: Iterable[float], device: torch.device) -> Tensor:
    """[b, 1] float64."""
    return torch.tensor(list(values), dtype=torch.float64, device=device)[:, None]


def _truncated(masses: Tensor, scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to zero the masses that top-k cuts off, and those that top-p cuts off of what is left.

    Each round takes more candidates, for the rows that the round before did not settle.

    Args:
        masses: [b, vocab] float64.
        scores: [b, vocab] fp32; they give the order.
        top_k: [b, 1] from 1 to vocab.
        top_p: [b, 1].
    """
    result, is_settled = _truncated_to_candidates(masses, scores, top_k, top_p, NUM_CANDIDATES[0])
    for num_candidates in (*NUM_CANDIDATES[1:], scores.shape[-1]):
        if is_settled.all():
            break
        rows = (~is_settled).nonzero()[:, 0]
        part, is_part_settled = _truncated_to_candidates(
            masses[rows], scores[rows], top_k[rows], top_p[rows], num_candidates
        )
        result[rows] = part
        is_settled[rows] = is_part_settled
    return result


def _truncated_to_candidates(
    masses: Tensor, scores: Tensor, top_k: Tensor, top_p: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Truncate as if only the tokens with the largest scores could be kept.

    Returns:
        Masses [b, vocab], zero outside the candidates; and [b] bool, False where a token outside
        them might have to be kept.
    """
    vocab = scores.shape[-1]
    ids = _ranked(scores, num_candidates)
    kept = masses.gather(-1, ids)
    rank = torch.arange(ids.shape[-1], device=ids.device)
    kept[rank >= top_k] = 0.0
    has_top_k = top_k < vocab
    total = torch.where(has_top_k, kept.sum(-1, keepdim=True), masses.sum(-1, keepdim=True))
    mass_before = kept.cumsum(-1) - kept
    kept *= mass_before < top_p * total
    result = torch.zeros_like(masses).scatter_(-1, ids, kept)
    if num_candidates >= vocab:
        return result, torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    # The last candidate may tie with tokens outside, and a larger k keeps tokens there.
    candidates = scores.gather(-1, ids)
    ties_with_last = candidates == candidates[:, -1:]
    keeps_last = ((kept > 0) & ties_with_last).any(-1)
    wants_more = (has_top_k & (top_k > num_candidates))[:, 0]
    return result, ~(keeps_last | wants_more)


def _ranked(scores: Tensor, width: int) -> Tensor:
    """As `ranked`, but any of those that tie with the last one may be in the result."""
    if width >= scores.shape[-1]:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ids = scores.topk(width, sorted=False).indices.sort(-1).values
    order = torch.sort(scores.gather(-1, ids), dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)
