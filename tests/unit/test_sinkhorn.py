"""crma.sinkhorn: doubly stochastic for all logits, alive under differentiation, and a bound that bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crma.sinkhorn import doubly_stochastic, norm_bound

SEEDS = st.integers(0, 2**32 - 1)
EXTREMES = {
    "zero": torch.zeros(4, 4),
    "huge and equal": torch.full((4, 4), 1e30),
    "very negative": torch.full((4, 4), -1e30),
    "one dominates": torch.zeros(4, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e30)),
    "one row dominates": torch.zeros(4, 4).index_fill(0, torch.tensor([3]), 1e4),
    "permutation": 1e4 * torch.eye(4)[[2, 0, 3, 1]],
    "no permutation": torch.tensor([[1e4, 1e4, -1e4], [-1e4, -1e4, 1e4], [-1e4, -1e4, 1e4]]),
    "denormal": torch.full((4, 4), 1e-44),
}


def check(M: Tensor) -> None:
    assert (M.sum(-1) - 1).abs().max() <= 1e-6
    assert (M.sum(-2) - 1).abs().max() <= 1e-6
    assert norm_bound(M).max() - 1 <= 1e-6
    assert M.min() >= -1e-7


def gradient(S: Tensor, cotangent: Tensor) -> Tensor:
    S = S.clone().requires_grad_()
    (doubly_stochastic(S) * cotangent).sum().backward()
    assert S.grad is not None
    return S.grad


@settings(derandomize=True, max_examples=100, deadline=None)
@given(SEEDS, st.integers(2, 6), st.floats(0.01, 30))
def test_any_logits_give_a_doubly_stochastic_matrix_with_a_finite_gradient(seed: int, n: int, sd: float) -> None:
    S = sd * torch.randn(20, n, n, generator=torch.Generator().manual_seed(seed))
    check(doubly_stochastic(S))
    assert torch.isfinite(gradient(S, torch.randn_like(S))).all()


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits_give_a_doubly_stochastic_matrix_with_a_finite_gradient(name: str) -> None:
    S = EXTREMES[name]
    check(doubly_stochastic(S))
    assert torch.isfinite(gradient(S, torch.randn_like(S))).all()


def test_the_gradient_lives_where_logits_are_large() -> None:
    """Without the soft cap a range of 160 underflows to a permutation that nothing can move."""
    S = 80 * (2 * torch.eye(4) - 1)
    assert gradient(S / 8, torch.randn(4, 4)).abs().max() > 1e-6
    with torch.no_grad():
        assert doubly_stochastic(S).min() > 1e-8


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
def test_two_streams_have_the_closed_form(logits: list[float]) -> None:
    """The doubly stochastic scaling of a 2x2 keeps its cross ratio: m / (1 - m) = sqrt(p11 p22 / (p12 p21))."""
    a, b, c, d = (6 * math.tanh(x / 6) for x in logits)
    m = 1 / (1 + math.exp((b + c - a - d) / 2))
    expected = torch.tensor([[m, 1 - m], [1 - m, m]])
    S = torch.tensor(logits).reshape(2, 2)
    for mapping in ("rounded", "sinkhorn"):
        torch.testing.assert_close(doubly_stochastic(S, mapping=mapping), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(doubly_stochastic(S, iterations=2000), expected, atol=2e-6, rtol=0)


def test_the_plain_alternation_is_kept_as_an_option_and_is_only_as_good_as_its_convergence() -> None:
    S = 30 * torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, rounded = doubly_stochastic(S, mapping="sinkhorn"), doubly_stochastic(S)
    assert (plain.sum(-2) - 1).abs().max() <= 1e-6
    assert (plain.sum(-1) - 1).abs().max() > 1e-3
    check(rounded)
    mild = torch.linspace(-1, 1, 16).reshape(4, 4).sin()
    torch.testing.assert_close(doubly_stochastic(mild), doubly_stochastic(mild, mapping="sinkhorn"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_map_is_float32_whatever_surrounds_it(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        M = doubly_stochastic(torch.randn(3, 4, 4).to(dtype))
    assert M.dtype == torch.float32
    check(M)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_the_bound_is_at_least_the_spectral_norm_of_any_matrix(seed: int, rows: int, columns: int) -> None:
    M = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    assert (norm_bound(M) >= torch.linalg.matrix_norm(M, ord=2) * (1 - 1e-12)).all()
