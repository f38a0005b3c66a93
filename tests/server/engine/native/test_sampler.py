"""server.engine.native.sampler: against the plain oracle of tests/sampling.py, and transformers."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import chosen
from torch import Tensor
from transformers import MinPLogitsWarper as MinP
from transformers import RepetitionPenaltyLogitsProcessor as Repetition
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

from server.engine.native.sampler import SamplingRow, sample, token_logprobs
from server.engine.request import SamplingParams, TokenLogprob

NO_FLOAT_HOLDS_IT = 10**309
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 5e-324, 1e-40, 0.009, 0.5, 1.0, 30.0]),
    top_p=st.sampled_from([1.0, 0.3, 0.9, 1e-30]),
    top_k=st.sampled_from([0, 1, 128, 200, 5000, NO_FLOAT_HOLDS_IT]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.4]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    logit_bias=st.sampled_from([(), (), ((2, 0.1), (5, -100.0)), ((9, 100.0),), ((7, -1.5),)]),
    seed=st.integers(0, 3),
)
FORBIDDEN = st.sampled_from([(), (), (7,), (0, 5, 9), tuple(range(1, 40))])


def few(noise: Tensor) -> Tensor:
    """Mostly -inf, with token 7 never so."""
    masked = noise.masked_fill(noise < 1.0, -torch.inf)
    return masked.index_fill(-1, torch.tensor([7]), 0.5)


SHAPES = {
    "plain": lambda noise: 3 * noise,
    "ties": lambda noise: (2 * noise).round(),
    "level": lambda noise: 0 * noise,
    "few": few,
    "huge": lambda noise: 1e38 * noise.clamp(-3, 3),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row(
    params: SamplingParams,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
) -> SamplingRow:
    return SamplingRow(params, prompt, output, seeded(params.seed or 0), forbidden)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(PARAMS, st.sampled_from([*SHAPES]), FORBIDDEN), min_size=1),
    st.sampled_from([40, 300, 3000]),
)
def test_a_row_gets_the_oracles_tokens_whatever_rows_are_beside_it(
    wanted: list[tuple[SamplingParams, str, tuple[int, ...]]], vocab: int
) -> None:
    """Over several steps: no row draws from another's generator. The logits are not changed."""
    seen = (1, 2, 2, 9), (2, 5, 5)
    rows = [row(params, *seen, forbidden) for params, _, forbidden in wanted]
    alone = [row(params, *seen, forbidden) for params, _, forbidden in wanted]
    for step in range(3):
        noise = torch.randn(len(rows), vocab, generator=seeded(step))
        shaped = [SHAPES[shape](x) for x, (_, shape, _) in zip(noise, wanted, strict=True)]
        logits = torch.stack(shaped)
        before = logits.clone()
        expected = [chosen(x, each) for x, each in zip(before, alone, strict=True)]
        assert sample(logits, rows) == expected
        assert torch.equal(logits, before)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(PARAMS, st.sampled_from([1.0, 1.7]), st.integers(0, 99))
def test_draws_invert_the_distribution_that_transformers_computes(
    params: SamplingParams, temperature: float, seed: int
) -> None:
    """For uniform numbers from 0 to almost 1: no draw falls on a token that was cut off."""
    logits = torch.randn(1, 400, generator=seeded(seed))
    prompt = tuple(range(0, 200, 3))
    biased = logits.clone()
    for token, bias in params.logit_bias:
        biased[0, token] += bias
    penalised = Repetition(params.repetition_penalty)(torch.tensor([prompt]), biased)
    scores = penalised.double() / temperature
    for warp in (TopK(params.top_k or 400), MinP(params.min_p), TopP(params.top_p)):
        scores = warp(None, scores)
    sums = scores.softmax(-1)[0].cumsum(-1)
    numbers = torch.linspace(0, 1 - 2**-53, 301, dtype=torch.float64)
    rows = [row(replace(params, temperature=temperature), prompt)] * 301
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", Mock(side_effect=numbers))
        tokens = sample(logits.expand(301, -1), rows)
    assert tokens == torch.searchsorted(sums, (1 - numbers) * sums[-1]).tolist()


REPETITION = {"repetition_penalty": 2.0}
PRESENCE = {"presence_penalty": 1.0}
FREQUENCY = {"frequency_penalty": 0.25}
PENALISED = [
    (4.0, REPETITION, 2.0),
    (-1.0, REPETITION, -2.0),
    (4.0, PRESENCE, 3.0),
    (4.0, FREQUENCY, 3.5),
    (4.0, REPETITION | PRESENCE | FREQUENCY, 0.5),
    (4.0, {}, 4.0),
]


def test_penalties_have_known_results() -> None:
    """Token 0 occurs twice in prompt and output.

    In one batch, each case stands once beside a token whose logit is the expected result, which
    loses the tie, and once beside one that is just better.
    """
    logits = []
    rows = []
    for logit, penalties, expected in PENALISED:
        for rival in (expected, expected + 0.01):
            logits.append([logit, rival])
            rows.append(row(SamplingParams(**penalties), (0, 0), (0, 0)))
    assert sample(torch.tensor(logits), rows) == [0, 1] * len(PENALISED)


def test_a_forbidden_token_is_chosen_only_where_nothing_else_is_possible() -> None:
    """A grammar may leave only the end of the answer, which min_tokens forbids."""
    logits = torch.tensor([[5.0, 1.0, 0.0], [-torch.inf, 1.0, -torch.inf]])
    for temperature in (0.0, 0.001, 2.0):
        rows = [row(SamplingParams(temperature=temperature), forbidden=(0, 1)) for _ in range(2)]
        assert sample(logits, rows) == [2, 1]


def test_log_probabilities_are_those_of_the_unmodified_distribution() -> None:
    logits = 5 * torch.randn(4, 300, generator=seeded(0))
    logits[3] = torch.arange(300) % 10  # each value 30 times
    expected = torch.log_softmax(logits, -1)
    tokens = [7, 0, 299, 1]
    num_top = [3, 0, 20, 5]
    found = token_logprobs(logits, tokens, num_top)
    for i, (token, k) in enumerate(zip(tokens, num_top, strict=True)):
        top_ids = torch.arange(9, 59, 10) if i == 3 else expected[i].topk(k).indices
        top_logprobs = [logprob for _, logprob in found[i].top]
        assert found[i].logprob == pytest.approx(expected[i, token].item(), abs=1e-5)
        assert [token_id for token_id, _ in found[i].top] == top_ids.tolist()
        assert top_logprobs == pytest.approx(expected[i, top_ids].tolist(), abs=1e-5)
    assert token_logprobs(logits[:1], [7], [0]) == [TokenLogprob(found[0].logprob)]
    assert token_logprobs(logits[:0], [], []) == []
