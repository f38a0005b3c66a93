"""The oracle: plain decoding of one request, with which every engine is compared.

It is slow on purpose, so that it stays simple.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from crma.method.injection import Injection, Plan
from crma.models.rope import rope_scaling

Choose = Callable[[Tensor, Sequence[int]], int]
"""Chooses the next token from its fp32 logits [vocab] and the tokens generated so far."""


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    Args:
        token_ids: the answer, without the stop token.
        logprobs: of these tokens, under the model's unmodified distribution.
        finish_reason: "stop" or "length".
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def likeliest(logits: Tensor, _: Sequence[int]) -> int:
    """The token with the largest logit; of equal ones, the lowest id."""
    scores = logits.tolist()
    return scores.index(max(scores))


def forget_lengths(model: nn.Module) -> None:
    """Give a model the rotary frequencies back that it was loaded with.

    transformers' dynamic ones stay those of the longest sequence until a short one comes.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if isinstance(getattr(module, "rope_type", None), str):
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


def generate(
    injection: Injection,
    prompt_ids: Sequence[int],
    plan: Plan | None = None,
    *,
    max_tokens: int = 16,
    stop_ids: Sequence[int] = (),
    choose: Choose = likeliest,
) -> Generation:
    """Decode one request alone, with transformers' own KV cache.

    Args:
        injection: the model.
        prompt_ids: at least one token.
        plan: the adapters of the only row; None: the base model.
        max_tokens: the most tokens to generate.
        stop_ids: tokens that end the answer; they are no part of it.
        choose: chooses each token; greedy by default.
    """
    device = next(injection.model.parameters()).device
    ids = torch.tensor([list(prompt_ids)], device=device)
    cache = None
    named = _cache_name(injection.model)
    rope = rope_scaling(injection.model.config)
    forget_lengths(injection.model)
    tokens: list[int] = []
    logprobs: list[float] = []
    with torch.inference_mode(), injection.active(plan or Plan()):
        while len(tokens) < max_tokens:
            output = injection.model(
                input_ids=ids, use_cache=True, logits_to_keep=1, **{named: cache}
            )
            cache = getattr(output, named)
            logits = output.logits[0, -1].float()
            token = choose(logits, tokens)
            if token in stop_ids:
                return Generation(tuple(tokens), tuple(logprobs), "stop")
            tokens.append(token)
            logprobs.append(torch.log_softmax(logits, -1)[token].item())
            ids = torch.tensor([[token]], device=device)
            if rope is not None and rope.is_outgrown(len(prompt_ids) + len(tokens)):
                cache = None
                ids = torch.tensor([[*prompt_ids, *tokens]], device=device)
    return Generation(tuple(tokens), tuple(logprobs), "length")


def _cache_name(model: nn.Module) -> str:
    """What the model calls its KV cache: before transformers 5.24, `past_key_values`."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
