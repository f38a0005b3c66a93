"""Memory in huge pages, for what steps read much of: weights, keys and values.

With pages of 4 KiB the processor looks up a page for every 64 cache lines, and what fetches ahead
stops at its end. Most distributions of Linux give huge pages only to a program that asks for them.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

CACHE_LINE = 64
HUGE_PAGE = 2 << 20  # bytes
MIN_RESERVED = 64 << 20  # bytes; what nobody writes to takes addresses, but no memory


class HugePages:
    """Hands out memory, part after part, for which the system is asked for huge pages.

    A system that does not have them gives small ones. A part's memory is freed when no tensor uses
    any part that was reserved together with it.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU that begins at a cache line; its values are not set.

        Raises MemoryError if the system does not give so much.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._rest):
            self._rest = _reserve(max(num_bytes, MIN_RESERVED))
        part = self._rest[:num_bytes]
        self._rest = self._rest[-(-num_bytes // CACHE_LINE) * CACHE_LINE :]
        return part.view(dtype).view(*shape)


def _reserve(num_bytes: int) -> Tensor:
    """At least so many bytes from the beginning of a huge page on, uint8 [n]."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # no Linux
        return torch.empty(num_bytes, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mapped = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    except OSError as error:
        wanted = f"{num_bytes >> 20} MiB for weights or the KV cache"
        raise MemoryError(f"the system does not give {wanted}: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a kernel that was built without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE_PAGE :]
