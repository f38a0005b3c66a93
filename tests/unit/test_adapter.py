"""crma.adapter: identity at the start, bounded for all parameters, folded as it is written, stored bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crma.adapter import Backbone, CrmaConfig, Factors, apply_unfolded, bounded
from crma.errors import ConfigError, InvalidAdapter
from crma.sinkhorn import norm_bound

CONFIG = CrmaConfig(num_layers=3, hidden_size=20, num_streams=4, stream_rank=3)


def random_backbone(config: CrmaConfig, seed: int, std: float = 1.0) -> Backbone:
    """Far from the identity: every parameter is random."""
    backbone, generator = Backbone(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=std, generator=generator)
    return backbone


BACKBONES = st.builds(
    random_backbone, st.just(CONFIG), st.integers(0, 2**31), st.sampled_from([0.01, 1.0, 30.0, 1e10, 1e30])
)
LONGEST = settings(derandomize=True, max_examples=40, deadline=None)


def matrices(backbone: Backbone) -> list[torch.Tensor]:
    """T of every layer as an explicit matrix, in float64, from the formula."""
    with torch.no_grad():
        factors = Factors(*(factor.double() for factor in backbone.factors()))
        return [apply_unfolded(torch.eye(20).double(), factors, layer).mT for layer in range(3)]


def test_it_starts_as_the_identity_with_orthonormal_reads() -> None:
    backbone = Backbone(CONFIG, torch.Generator().manual_seed(0))
    h = torch.randn(5, 20)
    for layer, pair in enumerate(backbone.folded("cpu", torch.float32)):
        assert torch.equal(h + pair.delta(h), h)
        assert torch.equal(apply_unfolded(h, backbone.factors(), layer), h)
        torch.testing.assert_close(backbone.R[layer] @ backbone.R[layer].mT, torch.eye(12))
    assert torch.equal(torch.sigmoid(backbone.gamma), torch.full((3,), 0.5))
    again = Backbone(CONFIG, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))


@LONGEST
@given(BACKBONES)
def test_no_parameters_break_the_bound(backbone: Backbone) -> None:
    with torch.no_grad():
        factors = backbone.factors()
    bounds = 1 + norm_bound(factors.M) * factors.g
    for T, bound in zip(matrices(backbone), bounds, strict=True):
        assert torch.linalg.matrix_norm(T, ord=2) <= bound + 1e-5


@LONGEST
@given(BACKBONES)
def test_the_folded_form_is_the_formula(backbone: Backbone) -> None:
    pairs = backbone.folded("cpu", torch.float32)
    for T, pair in zip(matrices(backbone), pairs, strict=True):
        torch.testing.assert_close(torch.eye(20) + pair.B @ pair.A, T.float(), atol=1e-5, rtol=0)
        h = torch.randn(2, 3, 20)
        torch.testing.assert_close(h + pair.delta(h), h @ T.float().mT, atol=1e-5, rtol=1e-5)


def test_factors_within_the_bound_are_left_alone_and_others_come_down_to_it() -> None:
    P = torch.randn(2, 4, 9)
    unit = P / torch.linalg.matrix_norm(P, ord=2)[:, None, None]
    assert torch.equal(bounded(0.9 * unit), 0.9 * unit)
    torch.testing.assert_close(bounded(7 * unit), unit)
    torch.testing.assert_close(bounded(7 * unit.mT), unit.mT)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e10, 1e30])
def test_the_gradient_through_the_normalisation_is_finite(size: float) -> None:
    P = (size * torch.randn(2, 4, 9)).requires_grad_()
    bounded(P).sum().backward()
    assert P.grad is not None
    assert torch.isfinite(P.grad).all()


@pytest.mark.parametrize("sd", [0.1, 3.0, 1e6])
def test_the_mixing_learns_nothing_at_the_start_and_in_every_layer_once_writes_are_not_zero(sd: float) -> None:
    backbone = Backbone(CONFIG, torch.Generator().manual_seed(0))
    for W, alive in ((0.0, False), (0.1, True)):
        torch.nn.init.normal_(backbone.W, std=W)
        torch.nn.init.normal_(backbone.S, std=sd if sd > 3 or alive else 0.1)
        backbone.zero_grad()
        A, B = backbone.fold()
        ((B @ A) * torch.randn(3, 20, 20)).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)
        assert backbone.S.grad is not None
        if sd <= 3 or not alive:
            assert (backbone.S.grad.flatten(1).norm(dim=1) > 0).tolist() == [alive] * 3


def test_the_plain_mapping_is_used_where_the_config_says_so() -> None:
    plain = random_backbone(CrmaConfig(3, 20, 4, 3, iterations=1, mapping="sinkhorn"), 0, std=30)
    assert (plain.mixing().sum(-1) - 1).abs().max() > 1e-3


def test_what_is_stored_comes_back_bit_for_bit_and_is_a_copy() -> None:
    backbone = random_backbone(CONFIG, 0)
    tensors = backbone.tensors()
    again = Backbone.from_tensors(CONFIG, tensors)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "S": (3, 4, 4),
        "R": (3, 12, 20),
        "W": (3, 20, 12),
        "gamma": (3,),
    }
    tensors["S"].zero_()
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert torch.count_nonzero(again.S) == again.S.numel()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda t: t.pop("gamma"), "gamma"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update(S=t["S"][:2]), "S"),
        (lambda t: t.update(R=t["R"].mT.contiguous()), "R"),
        (lambda t: t.update(W=t["W"].half()), "W"),
        (lambda t: t["W"].view(-1).__setitem__(5, math.nan), "W"),
        (lambda t: t["gamma"].__setitem__(0, math.inf), "gamma"),
    ],
)
def test_tensors_that_are_no_such_backbone_are_refused(change: Any, field: str) -> None:
    tensors = random_backbone(CONFIG, 0).tensors()
    change(tensors)
    with pytest.raises(InvalidAdapter) as caught:
        Backbone.from_tensors(CONFIG, tensors)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"iterations": 1001}, "iterations, cap"),
        ({"cap": 61.0}, "iterations, cap"),
        ({"cap": math.nan}, "iterations, cap"),
        ({"num_streams": 5, "stream_rank": 5}, "num_streams * stream_rank"),
        ({"mapping": "softmax"}, "mapping"),
        ({"depth": 3}, "depth"),
        ({"num_layers": "3"}, "config"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(changes: dict[str, Any], field: str) -> None:
    assert CrmaConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ConfigError) as caught:
        CrmaConfig.from_dict(CONFIG.to_dict() | changes)
    assert caught.value.field == field
