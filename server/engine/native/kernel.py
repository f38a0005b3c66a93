"""The native kernel: in C++ what lies between a decoder's matrix products. Optional: torch's operations do the same.

It is built once for this machine (a second), where there is a C++ compiler, from `kernel.cpp`. torch's operations on a
few rows cost several times what the rows do; and attention that reads the cache where it lies copies nothing.

Shapes: rows of one token each; H query heads over h key-value heads of size e; cache [N, z, 2h, e], N blocks of z.
"""

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from crma.core.errors import ConfigError

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
]
FLAGS += ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
SIGNATURES = {  # p: pointer, f: float, i: int64
    "norm": "ppfpii",
    "gate": "ppii",
    "rotate": "ppfppppiiii",
    "attend": "pippippifiiiii",
    "add_lora": "pppppppiii",
    "product": "pppppiiii",
}
_TYPES = {"p": c_void_p, "f": c_float, "i": c_int64}


class Kernel:
    """Its functions, for tensors of one dtype: contiguous, on the CPU, unless said otherwise.

    Raises:
        ConfigError: there is no compiler, or it does not build it; the message says why.
    """

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        self.dtype = dtype
        try:
            library = ctypes.CDLL(str(build(folder)))
        except (OSError, subprocess.SubprocessError) as error:
            message = f"the kernel cannot be built or loaded: {error}"
            raise ConfigError(
                message, field="kernel", value="on", allowed=f"{folder} to be written to"
            ) from error
        name = str(dtype).removeprefix("torch.")
        for function, types in SIGNATURES.items():
            # PYFUNCTYPE keeps the interpreter's lock: most calls are short, and to get the lock back can take long.
            kind = ctypes.CFUNCTYPE if function == "product" else ctypes.PYFUNCTYPE
            prototype = kind(None, *(_TYPES[each] for each in types))
            address = c_void_p.in_dll(library, f"{function}_{name}").value or 0
            setattr(self, f"_{function}", prototype(address))

    _norm: Any
    _gate: Any
    _rotate: Any
    _attend: Any
    _add_lora: Any
    _product: Any

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm of each row, x [rows, d] -> [rows, d]."""
        y = torch.empty_like(x)
        self._norm(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), *x.shape)
        return y

    def gate(self, x: Tensor) -> Tensor:
        """silu(a) * b of x [rows, 2d] = (a, b) -> [rows, d]."""
        rows, d = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, d)
        self._gate(x.data_ptr(), y.data_ptr(), rows, d)
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
        """Norms (if any: [H + h, e]) and turns queries and keys of heads [rows, H + 2h, e], in place, and puts keys and
        values into the cache at slots [rows]. rotation: cosines and sines [rows, 1, e], the sines' first half negated.
        """
        rows, both, e = heads.shape
        h = cache.shape[-2] // 2
        norms = None if head_norms is None else head_norms.data_ptr()
        cos, sin = (table.data_ptr() for table in rotation)
        self._rotate(
            heads.data_ptr(),
            norms,
            eps,
            cos,
            sin,
            cache.data_ptr(),
            slots.data_ptr(),
            rows,
            both - 2 * h,
            h,
            e,
        )

    def attend(
        self,
        query: Tensor,
        cache: Tensor,
        blocks: Tensor,
        positions: Tensor,
        out: Tensor,
        scaling: float,
        window: int | None,
    ) -> None:
        """Each row's attention to its positions 0 to its own, into out [rows, H, e].

        Args:
            query: [rows, H, e], the last two contiguous.
            blocks: [rows, m] of each row, in order; what is behind its position is not looked at.
            positions: [rows].
            window: how many positions it sees, the last ones; None: all.
        """
        (rows, H, e), (_, z, both, _) = query.shape, cache.shape
        # fmt: off
        self._attend(
            query.data_ptr(), query.stride(0), cache.data_ptr(), blocks.data_ptr(), blocks.shape[1],
            positions.data_ptr(), out.data_ptr(), window or 0, scaling, rows, H, both // 2, e, z,
        )
        # fmt: on

    def add_lora(
        self,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        first: Tensor,
        spans: Tensor,
        adapters: Tensor,
    ) -> None:
        """Adds to each row of y [rows, out] its own adapter's delta for x [rows, in].

        Args:
            A, B: [R, in], [R, out], of adapters one after the other.
            first: [adapters + 1]; adapter i has the rows of A and B from first[i] to first[i + 1].
            spans: [R, 2]; the part of a row of B that is not zero.
            adapters: [rows]; -1: none.
        """
        tensors = (t.data_ptr() for t in (y, x, A, B, first, spans, adapters))
        self._add_lora(*tensors, len(x), x.shape[1], y.shape[1])

    def product(self, x: Tensor, weight: "Int8Weight") -> Tensor:
        """x [rows, in] times the weight: [rows, out]; each row of x rounded to 127 steps of its own largest value."""
        out, width = weight.values.shape
        y = x.new_empty(len(x), out)
        tensors = (t.data_ptr() for t in (x, weight.values, weight.scales, weight.sums, y))
        self._product(*tensors, *x.shape, width, out)
        return y


@dataclass(frozen=True)
class Int8Weight:
    """A linear's weight in 8 bits: row i is values[i] * scales[i], its largest value 127 steps.

    values: int8 [out, in up to a multiple of 64]; scales: float32 [out]; sums of values: int32 [out].
    """

    values: Tensor
    scales: Tensor
    sums: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Rounds weight [out, in] to the nearest. Raises ConfigError unless out is a multiple of 4."""
        out, width = weight.shape
        if out % 4:
            raise ConfigError(
                "int8 takes outputs in fours",
                field="quantization",
                value=out,
                allowed="multiple of 4",
            )
        scales = weight.float().abs().amax(dim=1).clamp(min=1e-30) / 127
        values = torch.zeros(out, -(-width // 64) * 64, dtype=torch.int8)
        values[:, :width] = (weight.float() / scales[:, None]).round()
        return cls(values, scales, values.sum(dim=1, dtype=torch.int32))


@cache
def build(folder: Path) -> Path:
    """The library, in the folder under the hash of all that it depends on. Raises as `Kernel`."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ConfigError(
            "there is no C++ compiler", field="kernel", value="on", allowed="c++ or g++ on the PATH"
        )
    # The OpenMP library that torch has loaded: another would have threads of its own, at odds with torch's.
    openmp = [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))]
    command = [compiler, *FLAGS, str(SOURCE), "-Wl,--as-needed", *openmp]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    flags = "".join(
        line
        for line in lines[:40]
        if not re.match(r"processor|.*(MHz|apicid|core id|bogomips)", line, re.I)
    )
    parts = (
        SOURCE.read_bytes(),
        *(each.encode() for each in (*command, platform.machine(), flags)),
        version,
    )
    path = folder / f"kernel-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            found = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if found.returncode:
                message = f"{compiler} does not build the kernel: {found.stderr.strip()[:500]}"
                raise ConfigError(
                    message, field="kernel", value="on", allowed="a compiler of C++20 with OpenMP"
                )
            made.rename(path)
    return path
