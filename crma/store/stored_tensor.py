"""Tensors as a safetensors file holds them, read, checked and written without torch.

torch takes seconds to import, and importing or checking an adapter needs none of its arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors

from crma.core.files import invalid

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The dtypes that adapters are stored in: the name in the file -> torch's name."""

# The bits of a number without its sign. Read as an integer they are in the order of magnitudes, in
# which infinity and then NaN come last.
_MAGNITUDES: Mapping[str, np.unsignedinteger[Any]] = {
    "BF16": np.uint16(0x7FFF),
    "F16": np.uint16(0x7FFF),
    "F32": np.uint32(0x7FFFFFFF),
}

SMALL = 1 << 20  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """The bytes of one tensor.

    Attributes:
        dtype: as safetensors writes it, such as "BF16".
        shape: its dimensions.
        data: uint8 [number of bytes], row-major and little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredTensor:
        """The contents of a torch tensor, copied only if it is not contiguous on the CPU.

        Raises InvalidAdapter for a dtype that adapters are not stored in.
        """
        import torch

        names = {getattr(torch, torch_name): name for name, torch_name in TORCH_NAMES.items()}
        if tensor.dtype not in names:
            raise invalid(
                "Unsupported dtype.", "dtype", tensor.dtype, [str(name) for name in names]
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(names[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy())

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def to_torch(self) -> torch.Tensor:
        """A torch tensor over the same memory. Raises InvalidAdapter as `check_dtype`."""
        import torch

        self.check_dtype("dtype")
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        return torch.from_numpy(self.data).view(dtype).reshape(self.shape)

    def check_dtype(self, name: str) -> None:
        """Raises InvalidAdapter, naming the tensor, for a dtype that adapters are not stored in."""
        if self.dtype not in TORCH_NAMES:
            raise invalid("Unsupported dtype.", name, self.dtype, sorted(TORCH_NAMES))

    @cached_property
    def largest(self) -> float:
        """The largest magnitude that it holds, of which NaN is the largest; 0 if it holds nothing.

        Its dtype must have been checked.
        """
        magnitude = _MAGNITUDES[self.dtype]
        bits = (self.data.view(magnitude.dtype) & magnitude).max(initial=0, keepdims=True)
        return _numbers(self.dtype, bits)[0]

    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity. Its dtype must have been checked."""
        return math.isfinite(self.largest)


def read_tensors(data: bytes, where: str) -> dict[str, StoredTensor]:
    """The tensors in the bytes of a safetensors file. Raises InvalidAdapter that names `where`."""
    try:
        found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        message = f"Not a safetensors file: {error}."
        raise invalid(message, where, f"{len(data)} bytes", "safetensors") from error
    tensors = {}
    for name, tensor in found:
        content = np.frombuffer(tensor["data"], np.uint8)
        tensors[name] = StoredTensor(tensor["dtype"], tuple(tensor["shape"]), content)
    return tensors


def find_largest(tensors: Iterable[StoredTensor]) -> None:
    """Find `largest` of small tensors together: numpy takes longer to begin with one than it needs.

    Those of other dtypes than adapters have are left out.
    """
    small: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.dtype in _MAGNITUDES and 0 < tensor.data.nbytes <= SMALL:
            small[tensor.dtype].append(tensor)
    for dtype, some in small.items():
        magnitude = _MAGNITUDES[dtype]
        bits = np.concatenate([tensor.data for tensor in some]).view(magnitude.dtype)
        bits &= magnitude
        sizes = [tensor.numel for tensor in some]
        found = np.maximum.reduceat(bits, np.cumsum([0, *sizes[:-1]]))
        for tensor, largest in zip(some, _numbers(dtype, found), strict=True):
            tensor.__dict__["largest"] = largest  # where a cached property is


def _numbers(dtype: str, bits: np.ndarray[Any, Any]) -> list[float]:
    """The numbers of a dtype that have these bits [n]."""
    if dtype == "F16":
        return list(map(float, bits.view(np.float16)))
    if dtype == "BF16":  # the upper half of a float32
        bits = bits.astype(np.uint32) << np.uint32(16)
    return list(map(float, bits.view(np.float32)))


def write_tensors(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The bytes of a safetensors file, equal to those that `safetensors.torch.save` writes.

    The file says that its tensors are torch's, as transformers and PEFT expect.
    """
    specs = {
        name: safetensors.TensorSpec(
            dtype=TORCH_NAMES[tensor.dtype],
            shape=tensor.shape,
            data_ptr=tensor.data.ctypes.data,
            data_len=tensor.data.nbytes,
        )
        for name, tensor in tensors.items()
    }
    return bytes(safetensors.serialize(specs, metadata={"format": "pt"}))
