"""Stored tensors: the bytes of safetensors' torch module, and torch's view of which are finite."""

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values

from crma.core.errors import InvalidAdapter
from crma.store import stored_tensor
from crma.store.stored_tensor import StoredTensor, find_largest, read_tensors, write_tensors

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


@pytest.mark.parametrize("small", [0, 16, 1 << 20], ids=["none", "some", "all"])
def test_the_largest_numbers_found_together_are_those_of_each(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tensor, "SMALL", small)
    values = [[0.5, -3.0, 1.0], [], [float("inf"), 2.0], [float("nan")], [-0.0], [7.0, 8.0, 9.0]]
    plain = [torch.tensor(each) for each in values]
    stored = [StoredTensor.of(each.to(dtype)) for dtype in DTYPES for each in plain]
    stored.append(StoredTensor("I64", (1,), np.zeros(8, np.uint8)))
    find_largest(stored)
    largest = [max(map(abs, each), default=0.0) for each in values] * len(DTYPES)
    found = [tensor.largest for tensor in stored[:-1]]
    assert found == pytest.approx(largest, nan_ok=True)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InvalidAdapter, match="Unsupported dtype"):
        StoredTensor.of(torch.zeros(2, dtype=torch.float64))
    (tensor,) = read_tensors(safetensors.torch.save({"a": torch.zeros(2).double()}), "f").values()
    for refusal in (lambda: tensor.check_dtype("a"), tensor.to_torch):
        with pytest.raises(InvalidAdapter, match="Unsupported dtype"):
            refusal()


MAX_MEMORY = 2**20  # bytes, for files of a few hundred


def read_or_refused(data: bytes) -> dict[str, StoredTensor] | None:
    """What a file holds; None if it was refused by name. Neither takes more memory than a file."""
    tracemalloc.start()
    found = refused = None
    try:
        found = read_tensors(data, "f")
    except InvalidAdapter as error:
        refused = error
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_MEMORY
    assert refused is None or refused.field == "f"
    return found


def file_with(header: Any, content: bytes, claimed: int | None = None) -> bytes:
    """A file with a header, whose length is claimed to be another one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if claimed is None else claimed
    return struct.pack("<Q", length) + text + content


sizes = st.integers(-2, 2**64) | st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**62, 2**63 - 1, 10**30])
tensor_headers = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "X"])
        | json_values(),
        "shape": st.lists(sizes, max_size=4) | json_values(),
        "data_offsets": st.lists(sizes, max_size=3) | json_values(),
        "surprise": json_values(),
    },
)
headers = st.dictionaries(
    st.text(max_size=8) | st.just("__metadata__"), tensor_headers | json_values(), max_size=4
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(headers | json_values() | st.binary(max_size=60), st.binary(max_size=64))
def test_a_file_with_any_header_is_read_or_refused(header: Any, content: bytes) -> None:
    read_or_refused(file_with(header, content))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(0, 2**64 - 1), st.binary(max_size=64))
def test_a_header_of_any_claimed_length_is_read_or_refused(claimed: int, content: bytes) -> None:
    """A length of 2^63 must not be allocated."""
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    read_or_refused(file_with(header, content, claimed))
    read_or_refused(file_with(header, b"1234" + content, min(claimed, 200)))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=16))
def test_a_damaged_file_is_read_or_refused(place: int, damage: bytes) -> None:
    """What is read still has as many bytes as its shapes say."""
    intact = write_tensors({name: StoredTensor.of(tensor) for name, tensor in MIXED.items()})
    place %= len(intact)
    damaged = intact[:place] + damage + intact[place + len(damage) :]
    widths = {"F32": 4, "BF16": 2, "F16": 2}
    for tensor in (read_or_refused(damaged) or {}).values():
        if tensor.dtype in widths:
            assert tensor.data.nbytes == tensor.numel * widths[tensor.dtype]


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
dtypes = st.sampled_from(["F32", "BF16", "F16"])
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(["F32", "BF16", "F16"]), shapes)), st.data()
)
def test_tensors_of_any_name_and_shape_come_back_bit_for_bit(
    specs: dict[str, tuple[str, list[int]]], data: st.DataObject
) -> None:
    """NaN included: the bytes are kept, whatever number they are."""
    specs.pop("__metadata__", None)  # the format's own
    stored = {}
    for name, (dtype, shape) in specs.items():
        length = int(np.prod(shape)) * (4 if dtype == "F32" else 2)
        content = data.draw(st.binary(min_size=length, max_size=length))
        stored[name] = StoredTensor(dtype, tuple(shape), np.frombuffer(content, np.uint8))
    found = read_tensors(write_tensors(stored), "f")
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (stored[name].dtype, stored[name].shape)
        assert tensor.data.tobytes() == stored[name].data.tobytes()
