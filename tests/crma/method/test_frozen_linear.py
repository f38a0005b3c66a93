"""What DoRA takes of a linear, computed without a second weight of its size."""

import pytest
import torch
from torch import nn

from crma.method.frozen_linear import FrozenLinear, LearnedOutput, squared_norms


@pytest.mark.parametrize("out", [6, 5000])
def test_the_output_is_that_of_the_updated_weight(out: int) -> None:
    """The formula of DoRA on the whole weight; 5000 rows are normed in parts."""
    torch.manual_seed(0)
    linear = nn.Linear(8, out)
    A, B = torch.randn(3, 8), torch.randn(out, 3)
    bias, own_bias = torch.randn(2, out)
    magnitude, x = torch.rand(out) + 0.5, torch.randn(4, 8)
    with torch.no_grad():
        updated = linear.weight + 0.7 * B @ A
        factor = magnitude / updated.norm(dim=1)
        expected = (x @ updated.T + 0.7 * bias) * factor + own_bias
        learned = LearnedOutput(magnitude, bias, own_bias)
        affine = learned.affine(A, B, 0.7, FrozenLinear.of(linear))
        low_rank = 0.7 * x @ A.T @ (affine.scale[:, None] * B).T
        found = affine.applied(linear(x), None) + low_rank
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_without_anything_learned_the_output_keeps_its_bits() -> None:
    linear = nn.Linear(8, 6)
    A, B, y = torch.randn(3, 8), torch.randn(6, 3), torch.randn(4, 6).bfloat16()
    affine = LearnedOutput().affine(A, B, 2.0, FrozenLinear.of(linear))
    assert torch.equal(affine.applied(y, None), y)


def test_only_the_rows_of_the_index_change() -> None:
    y = torch.randn(4, 2, 6)
    affine = LearnedOutput(magnitude=torch.full((6,), 3.0)).affine(
        torch.zeros(1, 8), torch.zeros(6, 1), 1.0, FrozenLinear.of(nn.Linear(8, 6, bias=False))
    )
    found = affine.applied(y, torch.tensor([2]))
    assert torch.equal(found[[0, 1, 3]], y[[0, 1, 3]])
    torch.testing.assert_close(found[2], y[2] * affine.scale)


def test_an_embedding_is_a_linear_on_one_hot_rows() -> None:
    embedding = nn.Embedding(10, 4)
    frozen = FrozenLinear.of(embedding)
    one_hot = torch.eye(10)
    assert torch.equal(frozen.product(one_hot), embedding.weight)
    torch.testing.assert_close(frozen.squared_norms, squared_norms(embedding.weight.detach().mT))
