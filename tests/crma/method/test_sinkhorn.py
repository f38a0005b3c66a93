"""crma.method.sinkhorn: doubly stochastic for all logits, alive under differentiation, and a bound that bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crma.method.sinkhorn import doubly_stochastic, norm_bound

SEEDS = st.integers(0, 2**32 - 1)
LOGITS = st.tuples(SEEDS, st.integers(2, 6), st.floats(0.01, 30)).map(
    lambda of: of[2] * torch.randn(20, of[1], of[1], generator=torch.Generator().manual_seed(of[0]))
)
EXTREMES = [
    torch.full((4, 4), 1e30),
    torch.zeros(4, 4).index_put(
        (torch.tensor(1), torch.tensor(2)), torch.tensor(1e30)
    ),  # one dominates
    torch.zeros(4, 4).index_fill(0, torch.tensor([3]), 1e4),  # one row dominates
    1e4 * torch.eye(4)[[2, 0, 3, 1]],
    torch.tensor(
        [[1e4, 1e4, -1e4], [-1e4, -1e4, 1e4], [-1e4, -1e4, 1e4]]
    ),  # no permutation in its support
]
property_test = settings(derandomize=True, max_examples=60, deadline=None)


@property_test
@given(LOGITS | st.sampled_from(EXTREMES))
def test_any_logits_give_a_doubly_stochastic_matrix_with_a_finite_gradient(S: Tensor) -> None:
    S = S.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever surrounds it
        M = doubly_stochastic(S)
    assert M.dtype == torch.float32
    assert (M.sum(-1) - 1).abs().max() <= 1e-6
    assert (M.sum(-2) - 1).abs().max() <= 1e-6
    assert norm_bound(M).max() - 1 <= 1e-6
    assert M.min() >= -1e-7
    (M * torch.randn(S.shape)).sum().backward()
    assert S.grad is not None
    assert torch.isfinite(S.grad).all()


def test_the_gradient_lives_where_logits_are_large() -> None:
    """Without the soft cap a range of 160 underflows to a permutation that nothing can move."""
    S = (10 * (2 * torch.eye(4) - 1)).requires_grad_()
    (doubly_stochastic(S) * torch.randn(4, 4)).sum().backward()
    assert S.grad is not None
    assert S.grad.abs().max() > 1e-6
    assert doubly_stochastic(80 * (2 * torch.eye(4) - 1)).min() > 1e-8


@property_test
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
def test_two_streams_have_the_closed_form(logits: list[float]) -> None:
    """The doubly stochastic scaling of a 2x2 keeps its cross ratio: m / (1 - m) = sqrt(p11 p22 / (p12 p21))."""
    a, b, c, d = (6 * math.tanh(x / 6) for x in logits)
    m = 1 / (1 + math.exp((b + c - a - d) / 2))
    for mapping in ("rounded", "sinkhorn"):
        found = doubly_stochastic(
            torch.tensor(logits).reshape(2, 2), mapping=mapping, iterations=200
        )
        torch.testing.assert_close(found, torch.tensor([[m, 1 - m], [1 - m, m]]), atol=2e-6, rtol=0)


@property_test
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_the_bound_is_at_least_the_spectral_norm_of_any_matrix(
    seed: int, rows: int, columns: int
) -> None:
    M = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    assert (norm_bound(M) >= torch.linalg.matrix_norm(M, ord=2) * (1 - 1e-12)).all()
    ones = torch.ones(3, 3)
    assert norm_bound(ones) == pytest.approx(3)  # and no larger than it must be
