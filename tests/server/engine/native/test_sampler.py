"""server.engine.native.sampler: a row gets what it would get alone, what the oracle says, and what transformers leaves."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import chosen
from transformers import MinPLogitsWarper as MinP
from transformers import RepetitionPenaltyLogitsProcessor as Repetition
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

from server.engine.native.sampler import SamplingRow, sample, token_logprobs
from server.engine.request import SamplingParams, TokenLogprob

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-40, 0.5, 1.0, 30.0]),
    top_p=st.sampled_from([1.0, 0.3, 0.9, 1e-30]),
    top_k=st.sampled_from([0, 1, 128, 200, 5000]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.4]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    seed=st.integers(0, 3),
)
PENALTIES = [("repetition", 2.0), ("presence", 1.0), ("frequency", 0.25)]
shapes = {
    "plain": lambda x: 3 * x,
    "ties": lambda x: (2 * x).round(),
    "level": lambda x: 0 * x,
    "few": lambda x: x.masked_fill(x < 1.0, -torch.inf).index_fill(-1, torch.tensor([7]), 0.5),
    "huge": lambda x: 1e38 * x.clamp(-3, 3),
}


def row(
    p: SamplingParams, prompt: tuple[int, ...] = (), output: tuple[int, ...] = ()
) -> SamplingRow:
    return SamplingRow(p, prompt, output, torch.Generator().manual_seed(p.seed or 0))


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(params, st.sampled_from([*shapes])), min_size=1),
    st.sampled_from([40, 300, 3000]),
)
def test_a_seed_gives_one_token_in_any_company(
    wanted: list[tuple[SamplingParams, str]], vocab: int
) -> None:
    """Also over steps: a greedy or foreign row draws from nobody's generator. Nor are the logits changed."""
    rows, alone = ([row(p, (1, 2, 2, 9), (2, 5, 5)) for p, _ in wanted] for _ in range(2))
    for step in range(3):
        noise = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(step))
        logits = torch.stack(
            [shapes[shape](x) for x, (_, shape) in zip(noise, wanted, strict=True)]
        )
        before = logits.clone()
        assert sample(logits, rows) == [chosen(x, r) for x, r in zip(before, alone, strict=True)]
        assert torch.equal(logits, before)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(params, st.sampled_from([1.0, 1.7]), st.integers(0, 99))
def test_draws_invert_the_distribution_that_transformers_leaves(
    p: SamplingParams, t: float, seed: int
) -> None:
    """From one end of the numbers to the other: no draw falls on a token that was left out."""
    logits, prompt = (
        torch.randn(1, 400, generator=torch.Generator().manual_seed(seed)),
        tuple(range(0, 200, 3)),
    )
    scores = Repetition(p.repetition_penalty)(torch.tensor([prompt]), logits).double() / t
    for warp in (TopK(p.top_k or 400), MinP(p.min_p), TopP(p.top_p)):
        scores = warp(None, scores)
    steps = scores.softmax(-1)[0].cumsum(-1)
    numbers = torch.linspace(0, 1 - 2**-53, 301, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", Mock(side_effect=numbers))
        tokens = sample(logits.expand(301, -1), [row(replace(p, temperature=t), prompt)] * 301)
    assert tokens == torch.searchsorted(steps, (1 - numbers) * steps[-1]).tolist()


def test_penalties_have_known_answers() -> None:
    """In one batch, each case beside a rival that is as good as token 0 becomes, and beside one just better."""
    repetition, presence, frequency = ({f"{name}_penalty": by} for name, by in PENALTIES)
    cases = [
        (4.0, repetition, 2.0),
        (-1.0, repetition, -2.0),
        (4.0, presence, 3.0),
        (4.0, frequency, 3.5),
    ]
    cases += [(4.0, repetition | presence | frequency, 0.5), (4.0, {}, 4.0)]
    rows = [
        row(SamplingParams(**penalties), (0, 0), (0, 0))
        for _, penalties, _ in cases
        for _ in range(2)
    ]
    logits = [[logit, becomes + by] for logit, _, becomes in cases for by in (0.0, 0.01)]
    assert sample(torch.tensor(logits), rows) == [0, 1] * len(cases)


def test_log_probabilities_are_of_the_unmodified_distribution() -> None:
    logits = 5 * torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    logits[3] = torch.arange(300) % 10  # every value 30 times
    wanted, tokens, num_top = torch.log_softmax(logits, -1), [7, 0, 299, 1], [3, 0, 20, 5]
    found = token_logprobs(logits, tokens, num_top)
    for i, (token, k) in enumerate(zip(tokens, num_top, strict=True)):
        ids = torch.arange(9, 59, 10) if i == 3 else wanted[i].topk(k).indices
        assert found[i].logprob == pytest.approx(wanted[i, token].item(), abs=1e-5)
        assert [j for j, _ in found[i].top] == ids.tolist()
        assert [v for _, v in found[i].top] == pytest.approx(wanted[i, ids].tolist(), abs=1e-5)
    assert token_logprobs(logits[:1], [7], [0]) == [TokenLogprob(found[0].logprob)]
    assert token_logprobs(logits[:0], [], []) == []
