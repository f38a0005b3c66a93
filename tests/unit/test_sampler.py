"""server.engine.sampler: a row gets what it would get alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crma.generate import next_token
from server.engine.request import SamplingParams
from server.engine.sampler import sample

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 2.0]),
    top_p=st.sampled_from([1.0, 0.3]),
    top_k=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 3),
    logprobs=st.booleans(),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_lowest_of_equals_and_log_probabilities_are_of_the_unmodified_distribution() -> None:
    ties = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(ties, [SamplingParams()] * 2, [generator(0)] * 2) == ([1, 0], [None, None])
    asked = SamplingParams(temperature=0.1, top_k=1, logprobs=True)
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    assert sample(logits, [asked], [generator(0)]) == ([2], [pytest.approx(math.log(5 / 8), abs=1e-6)])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(rows=st.lists(params, min_size=1, max_size=5))
def test_a_seed_gives_one_token_in_any_company(rows: list[SamplingParams]) -> None:
    """Also over steps: a greedy or foreign row draws from nobody's generator."""
    generators = [generator(p.seed or 0) for p in rows]
    alone = [generator(p.seed or 0) for p in rows]
    for step in range(3):
        logits = torch.randn(len(rows), 40, generator=generator(step))
        tokens, logprobs = sample(logits, rows, generators)
        for i, p in enumerate(rows):
            assert tokens[i] == next_token(logits[i], p.temperature, p.top_k, p.top_p, alone[i])
            expected = torch.log_softmax(logits[i], -1)[tokens[i]].item()
            assert logprobs[i] == (pytest.approx(expected, abs=1e-6) if p.logprobs else None)
