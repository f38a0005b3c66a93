"""Plain one-request decode: the oracle that every engine test compares with. Slow on purpose, and simple."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crma.method.injection import Injection, Plan

Choose = Callable[
    [Tensor, Sequence[int]], int
]  # (fp32 logits [vocab], the answer so far) -> the next token


@dataclass(frozen=True)
class Generation:
    """token_ids without the stop token; logprobs of those tokens under the unmodified distribution; why it ended."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def likeliest(logits: Tensor, _: Sequence[int]) -> int:
    """Greedy; of equals the lowest id."""
    scores = logits.tolist()
    return scores.index(max(scores))


def generate(
    injection: Injection,
    prompt_ids: Sequence[int],
    plan: Plan | None = None,
    *,
    max_tokens: int = 16,
    stop_ids: Sequence[int] = (),
    choose: Choose = likeliest,
) -> Generation:
    """Decode one request alone with transformers' own cache.

    Args:
        injection: the model.
        prompt_ids: at least one token.
        plan: what the one row uses; None = base.
        stop_ids: tokens that end it; not part of the result.
        choose: how a token is chosen.
    """
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
            token = choose(logits, tokens)
            if token in stop_ids:
                return Generation(tuple(tokens), tuple(logprobs), "stop")
            tokens.append(token)
            logprobs.append(torch.log_softmax(logits, -1)[token].item())
            ids = torch.tensor([[token]], device=device)
    return Generation(tuple(tokens), tuple(logprobs), "length")
