"""Stored tensors: the bytes of safetensors' torch module, and torch's view of which are finite."""

import pytest
import safetensors.torch
import torch

from crma.core.errors import InvalidAdapter
from crma.store.stored_tensor import StoredTensor, read_tensors, write_tensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MIXED = {
    "z.weight": torch.randn(3, 5).to(torch.bfloat16),
    "b": torch.randn(7).half(),
    "a": torch.randn(2, 3, 4),
    "y": torch.randn(5, 3).T,
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
}


def test_the_file_is_byte_for_byte_the_one_that_safetensors_writes_for_torch() -> None:
    """Digests of published adapters depend on it. The names are unsorted and the dtypes mixed."""
    contiguous = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    expected = safetensors.torch.save(contiguous, metadata={"format": "pt"})
    from_torch = {name: StoredTensor.of(tensor) for name, tensor in MIXED.items()}
    assert write_tensors(from_torch) == expected
    assert write_tensors(read_tensors(expected, "f")) == expected


def test_a_tensor_comes_back_as_it_was_stored() -> None:
    stored = {name: StoredTensor.of(tensor) for name, tensor in MIXED.items()}
    for name, tensor in read_tensors(write_tensors(stored), "f").items():
        assert torch.equal(tensor.to_torch(), MIXED[name])
        assert tensor.to_torch().dtype == MIXED[name].dtype
        assert tensor.numel == MIXED[name].numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_nan_and_infinity_are_not_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    finite = [0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny, -limits.smallest_normal / 2]
    assert StoredTensor.of(torch.tensor(finite, dtype=dtype)).is_finite()
    for value in (float("nan"), float("inf"), float("-inf")):
        assert not StoredTensor.of(torch.tensor([1.0, value], dtype=dtype)).is_finite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_judged_as_torch_judges_it(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    found = [StoredTensor.of(number).is_finite() for number in every]
    assert found == every.isfinite().tolist()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InvalidAdapter, match="Unsupported dtype"):
        StoredTensor.of(torch.zeros(2, dtype=torch.float64))
    (tensor,) = read_tensors(safetensors.torch.save({"a": torch.zeros(2).double()}), "f").values()
    for refusal in (lambda: tensor.check_dtype("a"), tensor.to_torch):
        with pytest.raises(InvalidAdapter, match="Unsupported dtype"):
            refusal()
