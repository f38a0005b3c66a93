"""crma.generate: the order penalties, temperature, top-k, min-p, top-p, known answers, and repeatable draws."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import injection

from crma.generate import generate, next_token, penalised

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def drawn(temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Token -> how often in 2,000 draws."""
    generator = torch.Generator().manual_seed(0)
    tokens = [next_token(LOGITS, temperature, top_k, top_p, generator, min_p) for _ in range(2000)]
    return {token: tokens.count(token) / 2000 for token in sorted(set(tokens))}


@pytest.mark.parametrize(
    ("t", "top_k", "top_p", "min_p", "expected"),
    [
        (0.0, 0, 1.0, 0.0, {1: 1.0}),
        (1.0, 0, 1.0, 0.0, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (0.5, 0, 1.0, 0.0, {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),
        (1.0, 2, 1.0, 0.0, {1: 4 / 7, 3: 3 / 7}),
        (1.0, 0, 0.41, 0.0, {1: 4 / 7, 3: 3 / 7}),  # the token that crosses top_p is in
        (1.0, 3, 0.5, 0.0, {1: 4 / 7, 3: 3 / 7}),  # top-p over what top-k left: 4/9, 3/9, 2/9
        (0.5, 0, 0.5, 0.0, {1: 1.0}),  # temperature first: 16/30 is over a half
        (0.5, 0, 1.0, 0.45, {1: 16 / 25, 3: 9 / 25}),  # temperature first: 4/30 is below 0.45 of 16/30
        (1.0, 0, 0.5, 0.7, {1: 1.0}),  # top-p of what min-p left: 4/7, 3/7
    ],
)
def test_sampling_has_known_answers(t: float, top_k: int, top_p: float, min_p: float, expected: dict) -> None:
    assert drawn(t, top_k, top_p, min_p) == pytest.approx(expected, abs=0.04)


def test_penalties_have_known_answers() -> None:
    logits = torch.tensor([4.0, -2.0, 1.0, 3.0])
    assert penalised(logits, [0, 1], [1, 1, 2], (2.0, 0.5, 0.25)).tolist() == [2.0, -5.0, -0.25, 3.0]
    free, varied = (generate(injection(), [3, 4], max_tokens=20, penalties=(1.0, 0.0, f)).token_ids for f in (0.0, 1e6))
    assert len(set(free)) < len(set(varied)) == 20


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert next_token(torch.tensor([0.0, 2.0, 2.0]), 0.0, 0, 1.0, None) == 1


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.floats(0.1, 5.0))
def test_the_first_and_the_last_number_draw_a_token_of_the_nucleus(seed: int, top_p: float, t: float) -> None:
    """Sums of floats in two orders differ; the draw must not fall behind the last token that is left, nor the first."""
    logits = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    probabilities = torch.softmax(logits.double() / t, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", Mock(side_effect=torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)))
        for token in (next_token(logits, t, 0, top_p, None) for _ in range(2)):
            assert probabilities[probabilities > probabilities[token]].sum() < top_p + 1e-6


def test_a_seed_repeats_and_another_does_not() -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        return generate(injection(), [3, 4, 5], max_tokens=12, temperature=2.0, seed=seed).token_ids

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


def test_it_ends_at_a_stop_token_or_the_limit() -> None:
    free = generate(injection(), [3, 4, 5], max_tokens=6)
    assert (len(free.token_ids), len(free.logprobs), free.finish_reason) == (6, 6, "length")
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    stopped = generate(injection(), [3, 4, 5], max_tokens=6, stop_ids=[stop])
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:first], "stop")
    assert stopped.logprobs == free.logprobs[:first]


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-40, 1.0), (1e-6, 1.0), (1.0, 1e-30)])
def test_extreme_settings_choose_the_likeliest_token(temperature: float, top_p: float) -> None:
    """Logits over a tiny temperature overflowed to NaN, and the draw fell past the end of the vocabulary."""
    logits = torch.tensor([1.0, 30.0, 2.0])
    assert next_token(logits, temperature, 0, top_p, torch.Generator().manual_seed(0)) == 1
