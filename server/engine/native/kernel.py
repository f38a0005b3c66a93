"""The native kernel: what a decoder step computes, in C++.

It is optional: without it torch computes the same. With few rows, starting one of torch's
operations costs several times its work; the kernel's attention reads the cache in place, where
torch's has to copy the blocks first; and its products read weights of half the bytes.

Shapes: rows of one token each; H query heads over h key-value heads of size e; cache
[N, z, 2h, e], N blocks of z positions, as the kernel orders it (kv_cache.py).
"""

import ctypes
import subprocess
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crma.core.errors import ConfigError
from server.engine.native.cpu_class import CpuClass, default_classes, own_classes
from server.engine.native.kernel_build import build
from server.engine.native.packed_weight import Int8Weight, PackedWeight
from server.engine.native.prebuilt_kernel import find_prebuilt

_SIGNATURES = {  # p: pointer, f: float, i: int64
    "norm": "ppfpii",
    "gate": "ppii",
    "rotate": "ppfppppiiiii",
    "store_kv": "pppiiii",
    "attend": "pippippiffiiiiii",
    "add_lora": "pppiiiii",
    "product": "ppppiiii",
    "product_int8": "pppppiiii",
    "run_blocks": "ppff",
}
_TYPES = {"p": c_void_p, "f": c_float, "i": c_int64}

# Calls with as many operations let other threads run, and so does each product. They take about a
# tenth of a millisecond. To take the interpreter's lock back after a shorter one can take longer.
_LONG = 1_000_000
_OF_NUMBER = 8  # operations for a number that is normed, gated, rotated, or changed by an adapter


class Kernel:
    """The kernel's functions for one dtype.

    Tensors are contiguous and on the CPU unless a method says otherwise; they are not checked.

    Args:
        dtype: float32 or bfloat16.
        folder: where the library is built, unless the server came with one.
        cpu_class: name of the class that it is built for; None: the best of `default_classes`.

    Attributes:
        cpu_class: what the library is built for.

    Raises:
        ConfigError: the library cannot be built or loaded, or the processor is not of the class;
            the message says why.
    """

    def __init__(self, dtype: torch.dtype, folder: Path, cpu_class: str | None = None) -> None:
        self.dtype = dtype
        self.cpu_class, library = _load(folder, cpu_class)
        suffix = str(dtype).removeprefix("torch.")
        self._locked: dict[str, Any] = {}  # functions that keep the interpreter's lock
        self._unlocked: dict[str, Any] = {}  # the same, but others run meanwhile
        for name, types in _SIGNATURES.items():
            arguments = [_TYPES[each] for each in types]
            address = c_void_p.in_dll(library, f"{name}_{suffix}").value or 0
            self._locked[name] = ctypes.PYFUNCTYPE(None, *arguments)(address)
            self._unlocked[name] = ctypes.CFUNCTYPE(None, *arguments)(address)

    def _function(self, name: str, operations: int) -> Any:
        functions = self._unlocked if operations >= _LONG else self._locked
        return functions[name]

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm of each row: x [rows, d], weight [d] -> [rows, d]."""
        y = torch.empty_like(x)
        function = self._function("norm", _OF_NUMBER * x.numel())
        function(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), *x.shape)
        return y

    def gate(self, x: Tensor) -> Tensor:
        """silu(a) · b for x [rows, 2d], whose halves are a and b -> [rows, d]."""
        rows, d = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, d)
        function = self._function("gate", _OF_NUMBER * x.numel())
        function(x.data_ptr(), y.data_ptr(), rows, d)
        return y

    def rotate(
        self,
        heads: Tensor,
        head_norms: Tensor | None,
        eps: float,
        rotation: tuple[Tensor, Tensor],
        cache: Tensor,
        slots: Tensor,
    ) -> None:
        """Apply rotary embeddings to queries and keys, and store keys and values in the cache.

        Args:
            heads: [rows, H + 2h, e], queries, keys, values; queries and keys change in place.
            head_norms: [H + h, e], norm weights for queries and keys before the rotation, if any.
            eps: of these norms.
            rotation: cosines and sines [rows, 1, e], the first half of the sines negated.
            cache: changes at the slots.
            slots: [rows], the place of each row in the cache, of N · z.
        """
        rows, num_heads, e = heads.shape
        z, h = cache.shape[-3], cache.shape[-2] // 2
        norms = None if head_norms is None else head_norms.data_ptr()
        cos, sin = rotation
        # fmt: off
        self._function("rotate", _OF_NUMBER * heads.numel())(
            heads.data_ptr(), norms, eps, cos.data_ptr(), sin.data_ptr(),
            cache.data_ptr(), slots.data_ptr(), rows, num_heads - 2 * h, h, e, z,
        )
        # fmt: on

    def store_kv(self, keys_and_values: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Store keys and values [rows, 2h, e] in the cache, which changes at the slots [rows]."""
        rows, num_kv, e = keys_and_values.shape
        function = self._function("store_kv", _OF_NUMBER * keys_and_values.numel())
        pointers = (each.data_ptr() for each in (keys_and_values, cache, slots))
        function(*pointers, rows, num_kv // 2, e, cache.shape[-3])

    def attend(
        self,
        query: Tensor,
        cache: Tensor,
        blocks: Tensor,
        positions: Tensor,
        out: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
    ) -> None:
        """Attend from each row to the positions of its sequence up to its own.

        A row's result has the same bits whatever the other rows are, and however many threads
        compute it.

        Args:
            query: [n · s, H, e], sequence by sequence, of which the last two dimensions are
                contiguous.
            blocks: [n, m], each sequence's blocks in order; those after its positions are not read.
            positions: [n, s], of each sequence one after the other.
            out: [n · s, H, e], receives the result.
            scaling: of the scores.
            window: how many positions a row sees, the last ones; None: all.
            softcap: c bounds a score x to c · tanh(x / c); None: no bound.
        """
        _, H, e = query.shape
        _, z, num_kv, _ = cache.shape
        m = blocks.shape[1]
        # fmt: off
        self._function("attend", query.numel() * m * z)(
            query.data_ptr(), query.stride(0), cache.data_ptr(), blocks.data_ptr(), m,
            positions.data_ptr(), out.data_ptr(), window or 0, scaling, softcap or 0.0,
            *positions.shape, H, num_kv // 2, e, z,
        )
        # fmt: on

    def add_lora(self, y: Tensor, x: Tensor, loras: Tensor, site: int, pairs_of_site: int) -> None:
        """Add each row's own delta for x [rows, in] to y [rows, out], in place.

        A row's result has the same bits whatever the other rows are. x may be y.

        Args:
            loras: int64 [rows], where the `LoraTable` of each row's adapter is in memory; 0 for a
                row without one.
            site: index of the site in the tables.
            pairs_of_site: how many pairs the tables have for each site.
        """
        function = self._function("add_lora", _OF_NUMBER * (x.numel() + y.numel()))
        pointers = (each.data_ptr() for each in (y, x, loras))
        function(*pointers, site, pairs_of_site, len(x), x.shape[1], y.shape[1])

    def product(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] times the weight, plus the bias [out] if any -> [rows, out].

        A row's result has the same bits whatever the other rows are, and however many.
        """
        y = x.new_empty(len(x), weight.out_features)
        # fmt: off
        self._unlocked["product"](
            x.data_ptr(), weight.panels.data_ptr(), None if bias is None else bias.data_ptr(),
            y.data_ptr(), *x.shape, weight.num_words, weight.out_features,
        )
        # fmt: on
        return y

    def product_int8(self, x: Tensor, weight: Int8Weight) -> Tensor:
        """x [rows, in] times the weight -> [rows, out].

        Each row of x is rounded to 8 bits, by its own largest value.
        """
        y = x.new_empty(len(x), weight.out_features)
        tensors = (x, weight.panels, weight.scales, weight.sums, y)
        pointers = (each.data_ptr() for each in tensors)
        sizes = (*x.shape, weight.num_words, weight.out_features)
        self._unlocked["product_int8"](*pointers, *sizes)
        return y

    def run_blocks(self, h: Tensor, layout: Tensor, eps: float, scaling: float) -> None:
        """Run the blocks of a decoder on the residual stream h [rows, d], in place.

        Args:
            layout: int64, as `PackedBlocks` makes it.
            eps: of the norms.
            scaling: of the scores.
        """
        self._unlocked["run_blocks"](h.data_ptr(), layout.data_ptr(), eps, scaling)


def _load(folder: Path, name: str | None) -> tuple[CpuClass, ctypes.CDLL]:
    """The library for the class of this name, or for the best class that serves by default."""
    own = own_classes()
    named = [each for each in own if each.name == name]
    wanted = default_classes() if name is None else named
    for cpu_class in wanted:
        library = _load_class(folder, cpu_class)
        if library.may_run():
            return cpu_class, library
    raise ConfigError(
        f"kernel: this processor does not run that of the class {name}",
        field="kernel",
        value=name,
        allowed=", ".join(each.name for each in own),
    )


def _load_class(folder: Path, cpu_class: CpuClass) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(find_prebuilt(cpu_class) or build(folder, cpu_class)))
    except (OSError, subprocess.SubprocessError) as error:
        message = f"the kernel cannot be built or loaded: {error}"
        raise ConfigError(
            message, field="kernel", value="on", allowed=f"a writable folder {folder}"
        ) from error
