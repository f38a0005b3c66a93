"""Logits -> the next token of every row, and its log-probability."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from crma.generate import next_token
from server.engine.request import SamplingParams


def sample(
    logits: Tensor, params: Rows[SamplingParams], generators: Rows[torch.Generator]
) -> tuple[list[int], list[float | None]]:
    """One token a row.

    Args:
        logits: [b, vocab] fp32.
        params: one a row.
        generators: one CPU generator a row; only sampled rows draw from theirs.

    Returns:
        Token ids; log-probabilities under the unmodified distribution where asked for.
    """
    tokens = logits.argmax(-1).tolist()
    for i, p in enumerate(params):
        if p.temperature > 0:
            tokens[i] = next_token(logits[i].cpu(), p.temperature, p.top_k, p.top_p, generators[i])
    logprobs: list[float | None] = [None] * len(tokens)
    for i, p in enumerate(params):
        if p.logprobs:
            logprobs[i] = torch.log_softmax(logits[i], -1)[tokens[i]].item()
    return tokens, logprobs
