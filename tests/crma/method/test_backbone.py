"""crma.method.backbone: it starts as the identity, never exceeds its bound, and folds exactly."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crma.core.errors import ConfigError, InvalidAdapter
from crma.method.backbone import Backbone, CrmaConfig, Factors, apply_unfolded, bounded
from crma.method.sinkhorn import norm_bound

CONFIG = CrmaConfig(num_layers=3, hidden_size=20, num_streams=4, stream_rank=3)


def random_backbone(seed: int = 0, std: float = 1.0) -> Backbone:
    """A backbone far from the identity: every parameter is random."""
    backbone = Backbone(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=std, generator=generator)
    return backbone


def test_it_starts_as_the_identity_with_orthonormal_reads_and_half_open_gates() -> None:
    backbone = Backbone(CONFIG, torch.Generator().manual_seed(0))
    h = torch.randn(5, 20)
    assert all(torch.equal(h + pair.delta(h), h) for pair in backbone.folded("cpu", torch.float32))
    torch.testing.assert_close(backbone.R @ backbone.R.mT, torch.eye(12).expand(3, 12, 12))
    assert torch.equal(backbone.factors().g, torch.full((3,), 0.5))
    again = Backbone(CONFIG, torch.Generator().manual_seed(0))
    for one, other in zip(backbone.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.01, 1.0, 30.0, 1e10, 1e30]))
def test_all_parameters_keep_the_bound_and_the_folded_form_equals_the_formula(
    seed: int, std: float
) -> None:
    backbone = random_backbone(seed, std)
    with torch.no_grad():
        factors = backbone.factors()
    bounds = 1 + norm_bound(factors.M) * factors.g
    exact = Factors(*(factor.double() for factor in factors))
    for layer, pair in enumerate(backbone.folded("cpu", torch.float32)):
        T = apply_unfolded(torch.eye(20).double(), exact, layer).mT  # rows of I give columns of T
        assert torch.linalg.matrix_norm(T, ord=2) <= bounds[layer] + 1e-5
        torch.testing.assert_close(torch.eye(20) + pair.B @ pair.A, T.float(), atol=1e-5, rtol=0)
        h = torch.randn(2, 3, 20)
        torch.testing.assert_close(h + pair.delta(h), h @ T.float().mT, atol=1e-5, rtol=1e-5)


def test_factors_within_the_bound_are_unchanged_and_others_are_scaled_down_to_it() -> None:
    P = torch.randn(2, 4, 9)
    unit = P / torch.linalg.matrix_norm(P, ord=2)[:, None, None]
    assert torch.equal(bounded(0.9 * unit), 0.9 * unit)
    torch.testing.assert_close(bounded(7 * unit), unit)
    torch.testing.assert_close(bounded(7 * unit.mT), unit.mT)


@pytest.mark.parametrize(
    ("W", "S", "alive"),  # standard deviations; whether S has a gradient, None: either
    [(0.0, 1.0, False), (0.1, 0.1, True), (0.1, 3.0, True), (0.1, 1e6, None)],
)
def test_the_mixing_has_a_gradient_once_the_write_projection_is_not_zero(
    W: float, S: float, alive: bool | None
) -> None:
    backbone = Backbone(CONFIG, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(backbone.W, std=W)
    torch.nn.init.normal_(backbone.S, std=S)
    A, B = backbone.fold()
    ((B @ A) * torch.randn(3, 20, 20)).sum().backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    if alive is not None:
        assert (gradients["S"].flatten(1).norm(dim=1) > 0).tolist() == [alive] * 3


WRONG_TENSORS = [
    (lambda t: t.pop("gamma"), "gamma"),
    (lambda t: t.update(extra=torch.zeros(1)), "extra"),
    (lambda t: t.update(R=t["R"].mT.contiguous()), "R"),
    (lambda t: t.update(W=t["W"].half()), "W"),
    (lambda t: t["W"].view(-1).__setitem__(5, math.nan), "W"),
]


@pytest.mark.parametrize(("change", "field"), WRONG_TENSORS)
def test_tensors_that_do_not_fit_the_config_are_refused(change: Any, field: str) -> None:
    tensors = random_backbone().tensors()
    change(tensors)
    with pytest.raises(InvalidAdapter) as caught:
        Backbone.from_tensors(CONFIG, tensors)
    assert caught.value.field == field


WRONG_CONFIGS = [
    ({"num_layers": 0}, "num_layers"),
    ({"cap": math.nan}, "cap"),
    ({"num_streams": 5, "stream_rank": 5}, "fields"),
    ({"mapping": "softmax"}, "mapping"),
]


@pytest.mark.parametrize(("changes", "field"), WRONG_CONFIGS)
def test_an_invalid_config_is_refused(changes: dict[str, Any], field: str) -> None:
    assert CrmaConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ConfigError) as caught:
        CrmaConfig.from_dict(CONFIG.to_dict() | changes)
    assert caught.value.field == field
