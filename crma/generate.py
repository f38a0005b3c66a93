"""Plain one-request decode: the oracle that every engine test compares with. Slow on purpose, and simple."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crma.injection import Injection, Plan


@dataclass(frozen=True)
class Generation:
    """token_ids without the stop token; logprobs of those tokens under the unmodified distribution; why it ended."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def next_token(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    """One token from fp32 logits [vocab]; temperature 0 is greedy (lowest id among equals).

    Order: temperature, then top-k, then top-p over what is left; the draw walks the sorted distribution with one
    uniform number, so that the same seed gives the same token wherever the logits are the same.
    """
    if temperature == 0.0:
        return int(logits.argmax())
    # Against the largest first: a tiny temperature then gives -inf, never inf, and no softmax becomes NaN.
    ordered, ids = torch.sort((logits - logits.max()) / temperature, descending=True, stable=True)
    if top_k:
        ordered, ids = ordered[:top_k], ids[:top_k]
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    reached = torch.where(before < top_p, probabilities, 0.0).cumsum(-1)
    # Of this sum and no other: a draw beyond the last step would fall to a token that top-p left out.
    draw = torch.rand((), generator=generator) * reached[-1]
    return int(ids[min(int((reached <= draw).sum()), len(ids) - 1)])


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
    seed: int | None = None,
) -> Generation:
    """Decode one request alone with transformers' own cache.

    Args:
        injection: the model.
        prompt_ids: at least one token.
        plan: what the one row uses; None = base.
        stop_ids: tokens that end it; not part of the result.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    device = next(injection.model.parameters()).device
    ids = torch.tensor([list(prompt_ids)], device=device)
    cache = None
    tokens: list[int] = []
    logprobs: list[float] = []
    with torch.inference_mode(), injection.active(plan or Plan()):
        while True:
            output = injection.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
            cache = output.cache
            logits = output.logits[0, -1].float()
            token = next_token(logits.cpu(), temperature, top_k, top_p, generator)
            if token in stop_ids:
                return Generation(tuple(tokens), tuple(logprobs), "stop")
            tokens.append(token)
            logprobs.append(torch.log_softmax(logits, -1)[token].item())
            if len(tokens) == max_tokens:
                return Generation(tuple(tokens), tuple(logprobs), "length")
            ids = torch.tensor([[token]], device=device)
