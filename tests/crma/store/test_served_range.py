"""crma.store.served_range: a LoRA that passes is finite as it serves, and so are its updates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crma.core.errors import InvalidAdapter
from crma.method.lora import LoraPair
from crma.store.served_range import check_range
from crma.store.stored_tensor import StoredTensor

DTYPES = (torch.bfloat16, torch.float32)
magnitudes = st.one_of(
    st.sampled_from([0.0, 1e-45, 1e-20, 1.0, 1e19, 1e37, 1e38, 3e38, 3.4e38]),
    st.floats(0, 2.0**127, allow_subnormal=True, width=32),
)
scalings = st.one_of(st.sampled_from([-2.0, 0.0, 1.0, 1e6]), st.floats(-1e6, 1e6))


def passes(A: Tensor, B: Tensor, scaling: float, *, is_normed: bool = False) -> bool:
    try:
        check_range("q_proj", StoredTensor.of(A), StoredTensor.of(B), scaling, is_normed=is_normed)
    except InvalidAdapter:
        return False
    return True


@settings(derandomize=True, deadline=None, max_examples=300)
@given(magnitudes, magnitudes, scalings, st.integers(0, 10**6))
def test_a_pair_that_passes_is_finite_as_it_serves(
    a: float, b: float, scaling: float, seed: int
) -> None:
    """In each dtype that serves, for inputs of ±1."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.empty(3, 16).uniform_(-1, 1, generator=generator) * a
    B = torch.empty(8, 3).uniform_(-1, 1, generator=generator) * b
    x = torch.randint(0, 2, (5, 16), generator=generator) * 2.0 - 1
    if not (A.isfinite().all() and B.isfinite().all()) or not passes(A, B, scaling):
        return
    for dtype in DTYPES:
        pair = LoraPair(A.to(dtype), B.to(dtype), scaling)
        assert pair.scaled_b.isfinite().all()
        assert pair.delta(x.to(dtype)).isfinite().all()


@pytest.mark.parametrize(
    ("a", "b", "scaling"),
    [(1.0, 3e38, 2.0), (3e38, 1.0, 1.0), (1e20, 1e20, 1.0), (1.0, 3.395e38, 1.0), (1e-9, 3e38, 2)],
)
def test_a_pair_that_overflows_is_refused_by_the_name_of_its_linear(
    a: float, b: float, scaling: float
) -> None:
    A, B = (StoredTensor.of(torch.full((2, 2), value)) for value in (a, b))
    with pytest.raises(InvalidAdapter, match=r"overflow .* scaled") as caught:
        check_range("layers.0.q_proj", A, B, scaling, is_normed=False)
    assert caught.value.field == "layers.0.q_proj"
    assert None not in (caught.value.value, caught.value.allowed)


def test_trained_weights_pass_and_squares_count_where_lengths_are_computed() -> None:
    """DoRA divides by the length of a row: an infinite one would silence its output."""
    A, B = torch.full((2, 16), 0.1), torch.full((8, 2), 0.1)
    assert passes(A, B, 2.0, is_normed=True)
    assert passes(A, B * 1e20, 2.0)
    assert not passes(A, B * 1e20, 2.0, is_normed=True)
