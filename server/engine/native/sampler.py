"""From logits to the next token of each row, and to the log-probabilities of tokens.

A draw inverts the cumulative distribution, in the order of token ids, at one uniform number from
the row's own generator. Probabilities are whole numbers ("masses"): 2^32 for the most probable
token. Their sums are exact in float64, which holds whole numbers below 2^53, enough for 2^21 token
ids. The order of summation (alone or batched, on another device) therefore cannot move the border
between two tokens, and no draw falls on a token that was cut off. A token 2^33 times less probable
than the most probable one is never drawn.

A device chooses for all rows at once (score_rows.py). So does a processor where every token may be
drawn; else it chooses row by row, on one thread (score_row.py).
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.engine.native.score_row import LARGEST, ScoreRow
from server.engine.native.score_rows import choose, ranked
from server.engine.request import SamplingParams, TokenLogprob


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
    points = [1 - _uniform(row.generator) if row.params.temperature else 1.0 for row in rows]
    params = [row.params for row in rows]
    if scores.device.type == "cpu":
        return _choose_on_cpu(scores, params, points)
    return choose(scores, params, points)


def _choose_on_cpu(
    scores: Tensor, params: Sequence[SamplingParams], points: Sequence[float]
) -> list[int]:
    """As `score_rows.choose`."""
    tokens = {}
    together = [i for i, each in enumerate(params) if _draws_from_all(each)]
    if len(together) == len(params):
        return choose(scores, params, points)
    if together:
        drawn = choose(
            scores[together], [params[i] for i in together], [points[i] for i in together]
        )
        tokens = dict(zip(together, drawn, strict=True))
    for i, row in enumerate(scores.numpy()):
        if i not in tokens:
            tokens[i] = ScoreRow(row).choose(params[i], points[i])
    return [tokens[i] for i in range(len(params))]


def _draws_from_all(params: SamplingParams) -> bool:
    is_truncated = bool(params.top_k or params.min_p) or params.top_p < 1
    return params.temperature > 0 and not is_truncated


def are_numbers(logits: Tensor) -> list[bool]:
    """Whether `sample` can take each row of logits [b, vocab]: no NaN, no +inf, a finite value."""
    # That is so if its largest value is finite: that of a row with a NaN is NaN.
    if logits.device.type != "cpu":
        return logits.amax(-1).isfinite().tolist()
    return [math.isfinite(ScoreRow(row).largest_score) for row in logits.numpy()]


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
        One for each row. Of ties the lower ids come first; on a device, where more than 64 tokens
        tie at the end of the list, any of them may be in it.
    """
    logprobs = logits.log_softmax(-1)
    own = torch.tensor(token_ids, dtype=torch.long, device=logits.device)
    chosen = logprobs.gather(-1, own[:, None])[:, 0].tolist()
    width = max(num_top, default=0)
    if width == 0:
        return [TokenLogprob(value) for value in chosen]
    ids = _most_probable(logits[:, :num_tokens], width)
    top_ids = ids.tolist()
    top_logprobs = logprobs.gather(-1, ids).tolist()
    found = []
    for row, (value, k) in enumerate(zip(chosen, num_top, strict=True)):
        top = tuple(zip(top_ids[row][:k], top_logprobs[row][:k], strict=True))
        found.append(TokenLogprob(value, top))
    return found


def _most_probable(logits: Tensor, width: int) -> Tensor:
    """The ids [b, width] of the largest logits of each row, the largest first."""
    if logits.device.type != "cpu":
        return ranked(logits, width)
    return torch.tensor(np.stack([ScoreRow(row).ranked(width) for row in logits.numpy()]))


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


def _uniform(generator: torch.Generator) -> float:
    """A number in [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()
