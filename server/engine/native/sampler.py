"""From logits to the next token of each row, and to the log-probabilities of tokens.

A draw inverts the cumulative distribution, in the order of token ids, at one uniform number from
the row's own generator. Probabilities are whole numbers ("masses"): 2^32 for the most probable
token. Their sums are exact in float64, which holds whole numbers below 2^53, enough for 2^21 token
ids. The order of summation (alone or batched, on another device) therefore cannot move the border
between two tokens, and no draw falls on a token that was cut off. A token 2^33 times less probable
than the most probable one is never drawn.

Sorting a vocabulary takes about twenty times as long as finding its 128 largest scores. Only top-k
and top-p need an order; they start with few candidates, and take more only where those do not
settle the matter.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.request import SamplingParams, TokenLogprob

LARGEST = torch.finfo(torch.float32).max
MOST_PROBABLE_MASS = 2.0**32
ROOM_FOR_TIES = 64
NUM_CANDIDATES = (128, 2048)  # for top-k and top-p, before the whole vocabulary is sorted


class SamplingRow(NamedTuple):
    """Everything that belongs to one row of logits.

    Only a sampled row (temperature above 0) draws from its CPU generator. A forbidden token is
    chosen only where no other has a finite logit.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    generator: torch.Generator
    forbidden: Collection[int] = ()


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Choose one token for each row.

    Biases come first, then penalties. A greedy row (temperature 0) then takes the largest score,
    and among ties the lowest id. A sampled row applies temperature, min-p, top-k and top-p, and
    draws. Top-k keeps exactly k tokens, of ties the lowest ids; top-p keeps the token that crosses
    the threshold.

    Args:
        logits: [b, vocab] fp32, not changed; no NaN, no +inf, and a finite value in each row.
        rows: one for each row of logits. No row affects the token of another.
    """
    scores = _penalised(_biased(logits, rows), rows)
    scores = _without_forbidden(scores, rows)
    sampled = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if len(sampled) == len(rows):
        return _draw(scores, rows)
    tokens = _most_likely(scores)
    if sampled:
        drawn = _draw(scores[sampled], [rows[i] for i in sampled])
        for i, token in zip(sampled, drawn, strict=True):
            tokens[i] = token
    return tokens


def are_numbers(logits: Tensor) -> list[bool]:
    """Whether `sample` can take each row of logits [b, vocab]: no NaN, no +inf, a finite value."""
    # That is so if its largest value is finite: that of a row with a NaN is NaN.
    largest = logits.gather(-1, torch.tensor(_most_likely(logits), device=logits.device)[:, None])
    return largest[:, 0].isfinite().tolist()


def _most_likely(scores: Tensor) -> list[int]:
    """The token with the largest score of each row, of ties the lowest id; that of a NaN first."""
    if scores.device.type == "cpu":
        # On one thread, in a tenth of the time: torch wakes its other threads, and waits for them.
        tokens: list[int] = scores.numpy().argmax(-1).tolist()
        return tokens
    # max returns the first of ties, as argmax does, in a third of the time.
    found: list[int] = scores.max(-1).indices.tolist()
    return found


def rewind(generator: torch.Generator, num_draws: int) -> None:
    """Put a generator back to where it is after so many sampled tokens: each takes one draw."""
    generator.manual_seed(generator.initial_seed())
    for _ in range(num_draws):
        _uniform(generator)


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int], num_tokens: int | None = None
) -> list[TokenLogprob]:
    """Return log-probabilities under the unmodified distribution.

    Args:
        logits: [b, vocab] fp32.
        token_ids: one for each row: the token whose log-probability is wanted.
        num_top: one for each row: how many of the most probable tokens are wanted beside it.
        num_tokens: only ids below it are among those; None: all.

    Returns:
        One for each row. Of ties the lower ids come first; where more than 64 tokens tie at the
        end of the list, any of them may be in it.
    """
    logprobs = logits.log_softmax(-1)
    ids = torch.tensor(token_ids, dtype=torch.long, device=logits.device)
    chosen = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
    width = max(num_top, default=0)
    if width == 0:
        return [TokenLogprob(value) for value in chosen]
    ranked = _ranked(logits[:, :num_tokens], width + ROOM_FOR_TIES)[:, :width]
    top_ids = ranked.tolist()
    top_logprobs = logprobs.gather(-1, ranked).tolist()
    found = []
    for row, (value, k) in enumerate(zip(chosen, num_top, strict=True)):
        top = tuple(zip(top_ids[row][:k], top_logprobs[row][:k], strict=True))
        found.append(TokenLogprob(value, top))
    return found


def _biased(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Add the biases of each row to its logits (OpenAI).

    Returns:
        [b, vocab] fp32; `logits` itself if no row has a bias.
    """
    biases = [dict(row.params.logit_bias) for row in rows]
    if not any(biases):
        return logits
    cells = _cells(biases, logits.device)
    values = list(chain.from_iterable(found.values() for found in biases))
    added = torch.tensor(values, dtype=torch.float64, device=logits.device)
    return logits.index_put(cells, (logits[cells].double() + added).float())


def _without_forbidden(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Put the forbidden tokens of each row below all others.

    Their score stays finite where it was: a row of constrained logits may have nothing else.

    Returns:
        [b, vocab] fp32; `scores` itself if no row forbids a token.
    """
    forbidden = [row.forbidden for row in rows]
    if not any(forbidden):
        return scores
    cells = _cells(forbidden, scores.device)
    return scores.index_put(cells, scores[cells].clamp(max=-LARGEST))


def _cells(token_ids: Sequence[Collection[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The index of every token that a row names, row after row: rows [cells], ids [cells]."""
    num_cells = torch.tensor([len(found) for found in token_ids], device=device)
    row_index = torch.arange(len(token_ids), device=device).repeat_interleave(num_cells)
    return row_index, torch.tensor(list(chain.from_iterable(token_ids)), device=device)


def _penalised(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply the penalties: repetition first, then presence and frequency together.

    Only the cells of tokens that occur in prompt or output are computed, in float64.

    Returns:
        [b, vocab] fp32; `logits` itself if no row has a penalty.
    """
    occurrences = [_occurrences(row) if _has_penalty(row.params) else {} for row in rows]
    if not any(occurrences):
        return logits

    device = logits.device
    cells = _cells(occurrences, device)
    count_lists = [found.values() for found in occurrences]
    count = torch.tensor(list(chain.from_iterable(count_lists)), device=device)
    penalties = [_penalties(row.params) for row in rows]
    by_cell = torch.tensor(penalties, dtype=torch.float64, device=device)[cells[0]]
    repetition, presence, frequency = by_cell.unbind(-1)
    scores = _after_repetition(logits[cells].double(), repetition)
    scores -= _for_presence(count, presence) + _for_frequency(count, frequency)
    # Not beyond the largest fp32: an infinite score would make every probability NaN.
    scores.clamp_(max=LARGEST)
    return logits.index_put(cells, scores.float())


def _penalties(params: SamplingParams) -> tuple[float, float, float]:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)


def _has_penalty(params: SamplingParams) -> bool:
    return _penalties(params) != (1, 0, 0)


def _occurrences(row: SamplingRow) -> dict[int, int]:
    """How often each token of prompt and output occurs in the output; 0 if only in the prompt."""
    return {**dict.fromkeys(row.prompt_ids, 0), **Counter(row.output_ids)}


def _after_repetition(scores: Tensor, penalty: Tensor) -> Tensor:
    """Make scores [cells] less probable by a factor (Keskar et al. 2019, CTRL, section 4.1).

    A negative score is multiplied, as in transformers: dividing it would make it more probable.
    """
    return torch.where(scores > 0, scores / penalty, scores * penalty)


def _for_presence(count: Tensor, penalty: Tensor) -> Tensor:
    """The amount to subtract if a token occurs in the output at all (OpenAI)."""
    return torch.where(count > 0, penalty, 0.0)


def _for_frequency(count: Tensor, penalty: Tensor) -> Tensor:
    """The amount to subtract for all occurrences of a token in the output (OpenAI)."""
    return penalty * count


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draw one token for each sampled row.

    Args:
        scores: [b, vocab] fp32, after penalties.
        rows: b rows with a temperature above 0.
    """
    device = scores.device
    params = [row.params for row in rows]
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
    # In (0, 1]: the first sum that reaches a draw then belongs to a token with a mass, and there
    # always is one.
    draws = [1 - _uniform(row.generator) for row in rows]
    return torch.searchsorted(sums, _column(draws, device) * sums[:, -1:])[:, 0].tolist()


def _uniform(generator: torch.Generator) -> float:
    """A number in [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()


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
    """Return the ids of the largest scores of each row: the largest first, of ties the lowest id.

    Of the ids that tie with the last one, any may be in the result.

    Args:
        scores: [b, vocab].
        width: how many; at most the vocabulary is returned.
    """
    if width >= scores.shape[-1]:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ids = scores.topk(width, sorted=False).indices.sort(-1).values
    order = torch.sort(scores.gather(-1, ids), dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)
