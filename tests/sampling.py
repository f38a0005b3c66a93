"""How one sequence chooses its tokens, in plain Python: the oracle for the engine's sampler."""

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

LARGEST_FP32 = torch.finfo(torch.float32).max


def chooser(
    params: SamplingParams, prompt: Sequence[int], index: int = 0, stop_ids: Sequence[int] = ()
) -> Choose:
    """Return how sequence `index` of a request chooses its tokens, for `generate`.

    Args:
        stop_ids: tokens that end an answer, and that none may have before `min_tokens`.
    """
    generator = torch.Generator().manual_seed((params.seed or 0) + index)

    def choose(logits: Tensor, output: Sequence[int]) -> int:
        forbidden = stop_ids if len(output) < params.min_tokens else ()
        return chosen(logits, SamplingRow(params, prompt, output, generator, forbidden))

    return choose


def penalised(logits: Tensor, row: SamplingRow) -> Tensor:
    """Apply to logits [vocab] the biases, the penalties, and the ban of forbidden tokens.

    The repetition penalty comes first, on tokens of prompt and output; then the presence and
    frequency penalties, on tokens of the output only.
    """
    params = row.params
    scores = logits.tolist()
    for token, bias in params.logit_bias:
        scores[token] = torch.tensor(scores[token] + bias).item()  # a logit again: fp32
    for token in {*row.prompt_ids, *row.output_ids}:
        if scores[token] > 0:
            scores[token] /= params.repetition_penalty
        else:
            scores[token] *= params.repetition_penalty
    for token, count in Counter(row.output_ids).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token in row.forbidden:
        scores[token] = min(scores[token], -LARGEST_FP32)
    return torch.tensor(scores).clamp(max=LARGEST_FP32)  # inf - inf would be NaN


def chosen(logits: Tensor, row: SamplingRow) -> int:
    """Choose one token from fp32 logits [vocab].

    Temperature 0 is greedy, and takes the lowest id among ties. Otherwise the order is: penalties,
    temperature, top-k (exactly k tokens, of ties the lowest ids), min-p, then top-p over the tokens
    that are left. The draw walks the token ids with one uniform number. Probabilities are whole
    numbers, whose sums have no rounding: the same seed gives the same token for the same logits.
    """
    params = row.params
    penalised_logits = penalised(logits, row)
    if params.temperature == 0.0:
        return likeliest(penalised_logits, ())
    scores = penalised_logits.tolist()
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])  # stable
    best = scores[ranked[0]]
    masses: dict[int, int] = {}
    for token in ranked[: params.top_k or None]:
        # Subtract the best first: a tiny temperature then gives -inf, never inf.
        odds = math.exp((scores[token] - best) / params.temperature)
        if odds >= params.min_p:
            masses[token] = round(2**32 * odds)
    total = sum(masses.values())
    kept: list[int] = []
    mass_before = 0
    for token, mass in masses.items():
        if mass_before < params.top_p * total:
            kept.append(token)
        mass_before += mass
    kept.sort()
    sums = list(accumulate(masses[token] for token in kept))
    uniform = torch.rand((), dtype=torch.float64, generator=row.generator).item()
    draw = 1 - uniform  # in (0, 1]
    return kept[bisect_left(sums, draw * sums[-1])]
