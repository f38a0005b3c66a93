"""How one sequence chooses its tokens, by the book and in plain Python: what `server.engine.sampler` has to equal."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from crma.models.reference import Choose, likeliest
from server.engine.native.sampler import SamplingRow
from server.engine.request import SamplingParams


def chooser(params: SamplingParams, prompt: Sequence[int], index: int = 0) -> Choose:
    """Of sequence `index` of a request, for `generate`."""
    generator = torch.Generator().manual_seed((params.seed or 0) + index)
    return lambda logits, output: chosen(logits, SamplingRow(params, prompt, output, generator))


def penalised(logits: Tensor, row: SamplingRow) -> Tensor:
    """Logits [vocab] after the repetition penalty of prompt and output, then the other two, of the output only."""
    p, scores = row.params, logits.tolist()
    for token in {*row.prompt_ids, *row.output_ids}:
        by = p.repetition_penalty
        scores[token] = scores[token] / by if scores[token] > 0 else scores[token] * by
    for token, count in Counter(row.output_ids).items():
        scores[token] -= p.presence_penalty + p.frequency_penalty * count
    return torch.tensor(scores).clamp(max=torch.finfo(torch.float32).max)  # inf - inf would be NaN


def chosen(logits: Tensor, row: SamplingRow) -> int:
    """One token from fp32 logits [vocab]; temperature 0 is greedy (lowest id among equals).

    Order: penalties, temperature, top-k (exactly k; of equals the lowest ids), min-p, then top-p over what is left. The
    draw walks the token ids with one uniform number, so that the same seed gives the same token wherever the logits are
    the same: probabilities are whole numbers, whose sums have no rounding.
    """
    p, logits = row.params, penalised(logits, row)
    if p.temperature == 0.0:
        return likeliest(logits, ())
    scores = logits.tolist()
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])  # stable
    # Against the largest first: a tiny temperature then gives -inf, never inf.
    best = scores[ranked[0]]
    odds = {
        token: math.exp((scores[token] - best) / p.temperature)
        for token in ranked[: p.top_k or None]
    }
    masses = {token: round(2**32 * odd) for token, odd in odds.items() if odd >= p.min_p}
    before = [*accumulate(masses.values(), initial=0)]
    nucleus = sorted(
        token for token, mass in zip(masses, before, strict=False) if mass < p.top_p * before[-1]
    )
    sums = list(accumulate(masses[token] for token in nucleus))
    draw = 1 - torch.rand((), dtype=torch.float64, generator=row.generator).item()  # in (0, 1]
    return nucleus[bisect_left(sums, draw * sums[-1])]
