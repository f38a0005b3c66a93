"""crma.generate: the order temperature, top-k, top-p, known answers, and repeatable draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import injection

from crma.generate import generate, next_token

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def drawn(temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> how often in 2,000 draws."""
    generator = torch.Generator().manual_seed(0)
    tokens = [next_token(LOGITS, temperature, top_k, top_p, generator) for _ in range(2000)]
    return {token: tokens.count(token) / 2000 for token in sorted(set(tokens))}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (0.0, 0, 1.0, {1: 1.0}),
        (1.0, 0, 1.0, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (0.5, 0, 1.0, {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),
        (1.0, 2, 1.0, {1: 4 / 7, 3: 3 / 7}),
        (1.0, 0, 0.41, {1: 4 / 7, 3: 3 / 7}),  # the token that crosses top_p is in
        (1.0, 3, 0.5, {1: 4 / 7, 3: 3 / 7}),  # top-p over what top-k left: 4/9, 3/9, 2/9
        (0.5, 0, 0.5, {1: 1.0}),  # temperature first: 16/30 is over a half
    ],
)
def test_sampling_has_known_answers(temperature: float, top_k: int, top_p: float, expected: dict[int, float]) -> None:
    assert drawn(temperature, top_k, top_p) == pytest.approx(expected, abs=0.04)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert next_token(torch.tensor([0.0, 2.0, 2.0]), 0.0, 0, 1.0, None) == 1


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.floats(0.1, 5.0))
def test_the_last_number_below_one_still_draws_a_token_of_the_nucleus(seed: int, top_p: float, t: float) -> None:
    """Sums of floats in two orders differ; the draw must not fall behind the last token that is left."""
    logits = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    probabilities = torch.softmax(logits.double() / t, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1 - 2**-24))
        token = next_token(logits, t, 0, top_p, None)
    assert probabilities[probabilities > probabilities[token]].sum() < top_p + 1e-3


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
