"""Plain one-request decode: the oracle that every engine test compares with. Slow on purpose, and simple."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from crma.injection import Injection, Plan

Penalties = tuple[float, float, float]  # repetition (1: off), presence and frequency (0: off)


@dataclass(frozen=True)
class Generation:
    """token_ids without the stop token; logprobs of those tokens under the unmodified distribution; why it ended."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def penalised(logits: Tensor, prompt: Sequence[int], output: Sequence[int], penalties: Penalties) -> Tensor:
    """Logits [vocab] fp32 after the repetition penalty of prompt and output, then the other two, of the output only."""
    repetition, presence, frequency = penalties
    scores = logits.tolist()
    for token in {*prompt, *output}:
        scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
    for token, count in Counter(output).items():
        scores[token] -= presence + frequency * count
    return torch.tensor(scores).clamp(max=torch.finfo(torch.float32).max)  # inf - inf would be NaN


def next_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None, min_p: float = 0.0
) -> int:
    """One token from fp32 logits [vocab]; temperature 0 is greedy (lowest id among equals).

    Order: temperature, top-k (exactly k; of equals the lowest ids), min-p, then top-p over what is left. The draw walks
    the token ids with one uniform number, so that the same seed gives the same token wherever the logits are the same:
    probabilities are whole numbers, whose sums have no rounding.
    """
    scores = logits.tolist()
    best = max(scores)
    if temperature == 0.0:
        return scores.index(best)
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])  # stable
    # Against the largest first: a tiny temperature then gives -inf, never inf.
    odds = {token: math.exp((scores[token] - best) / temperature) for token in ranked[: top_k or None]}
    masses = {token: round(2**32 * p) for token, p in odds.items() if p >= min_p}
    before = [*accumulate(masses.values(), initial=0)]
    nucleus = sorted(token for token, mass in zip(masses, before, strict=False) if mass < top_p * before[-1])
    sums = list(accumulate(masses[token] for token in nucleus))
    draw = 1 - torch.rand((), dtype=torch.float64, generator=generator).item()  # in (0, 1]
    return nucleus[bisect_left(sums, draw * sums[-1])]


def generate(
    injection: Injection,
    prompt_ids: Sequence[int],
    plan: Plan | None = None,
    *,
    max_tokens: int = 16,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalties: Penalties = (1.0, 0.0, 0.0),
    seed: int | None = None,
) -> Generation:
    """Decode one request alone with transformers' own cache.

    Args:
        injection: the model.
        prompt_ids: at least one token.
        plan: what the one row uses; None = base.
        stop_ids: tokens that end it; not part of the result.
        penalties: repetition, presence, frequency.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    device = next(injection.model.parameters()).device
    ids = torch.tensor([list(prompt_ids)], device=device)
    cache = None
    tokens: list[int] = []
    logprobs: list[float] = []
    with torch.inference_mode(), injection.active(plan or Plan()):
        while len(tokens) < max_tokens:
            output = injection.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
            cache = output.cache
            logits = output.logits[0, -1].float()
            scores = penalised(logits, prompt_ids, tokens, penalties)
            token = next_token(scores, temperature, top_k, top_p, generator, min_p)
            if token in stop_ids:
                return Generation(tuple(tokens), tuple(logprobs), "stop")
            tokens.append(token)
            logprobs.append(torch.log_softmax(logits, -1)[token].item())
            ids = torch.tensor([[token]], device=device)
    return Generation(tuple(tokens), tuple(logprobs), "length")
