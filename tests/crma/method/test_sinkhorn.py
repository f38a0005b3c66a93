"""crma.method.sinkhorn: doubly stochastic with a gradient for all logits, and a true norm bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crma.method.sinkhorn import doubly_stochastic, norm_bound

SEEDS = st.integers(0, 2**32 - 1)
ONE_LARGE_ENTRY = torch.zeros(4, 4)
ONE_LARGE_ENTRY[1, 2] = 1e30
ONE_LARGE_ROW = torch.zeros(4, 4)
ONE_LARGE_ROW[3] = 1e4
NO_PERMUTATION = torch.tensor([[1e4, 1e4, -1e4], [-1e4, -1e4, 1e4], [-1e4, -1e4, 1e4]])
EXTREMES = [
    torch.full((4, 4), 1e30),
    ONE_LARGE_ENTRY,
    ONE_LARGE_ROW,
    1e4 * torch.eye(4)[[2, 0, 3, 1]],
    NO_PERMUTATION,  # none lies in the support of exp(S)
]
property_test = settings(derandomize=True, max_examples=60, deadline=None)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def logits_of_any_size(draw: st.DrawFn) -> Tensor:
    """Twenty matrices of normal logits."""
    seed, n, scale = draw(SEEDS), draw(st.integers(2, 6)), draw(st.floats(0.01, 30))
    return scale * normal(seed, 20, n, n)


@property_test
@given(logits_of_any_size() | st.sampled_from(EXTREMES))
def test_any_logits_give_a_doubly_stochastic_matrix_with_a_finite_gradient(S: Tensor) -> None:
    S = S.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the map
        M = doubly_stochastic(S)
    assert M.dtype == torch.float32
    assert (M.sum(-1) - 1).abs().max() <= 1e-6
    assert (M.sum(-2) - 1).abs().max() <= 1e-6
    assert norm_bound(M).max() - 1 <= 1e-6
    assert M.min() >= -1e-7
    (M * torch.randn(S.shape)).sum().backward()
    assert S.grad is not None
    assert torch.isfinite(S.grad).all()


def test_the_gradient_does_not_vanish_for_large_logits() -> None:
    """Without the soft cap, a range of 160 underflows to a permutation without a gradient."""
    S = (10 * (2 * torch.eye(4) - 1)).requires_grad_()
    (doubly_stochastic(S) * torch.randn(4, 4)).sum().backward()
    assert S.grad is not None
    assert S.grad.abs().max() > 1e-6
    assert doubly_stochastic(80 * (2 * torch.eye(4) - 1)).min() > 1e-8


@property_test
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
def test_two_streams_have_the_closed_form(logits: list[float]) -> None:
    """The doubly stochastic scaling of a 2x2 matrix keeps its cross ratio.

    So m / (1 - m) = sqrt(p11 p22 / (p12 p21)).
    """
    a, b, c, d = (6 * math.tanh(x / 6) for x in logits)
    m = 1 / (1 + math.exp((b + c - a - d) / 2))
    for mapping in ("rounded", "sinkhorn"):
        S = torch.tensor(logits).reshape(2, 2)
        found = doubly_stochastic(S, mapping=mapping, iterations=200)
        expected = torch.tensor([[m, 1 - m], [1 - m, m]])
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@property_test
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_the_bound_is_at_least_the_spectral_norm_of_any_matrix(
    seed: int, rows: int, columns: int
) -> None:
    M = normal(seed, 5, rows, columns).double()
    assert (norm_bound(M) >= torch.linalg.matrix_norm(M, ord=2) * (1 - 1e-12)).all()


def test_the_bound_is_tight_where_it_can_be() -> None:
    assert norm_bound(torch.ones(3, 3)) == pytest.approx(3)
