"""Builds the native kernel from `kernel.cpp`, once for a machine: about a second."""

import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from crma.core.errors import ConfigError

SOURCE = Path(__file__).with_name("kernel.cpp")
OPTIONS = (  # of the compiler, whatever the processor
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
_OWN_PROCESSOR = ["-march=native"]
if platform.machine() == "x86_64":
    _OWN_PROCESSOR.append("-mprefer-vector-width=512")
_VARIES_BY_CORE = re.compile(r"processor|.*(MHz|apicid|core id|bogomips)", re.IGNORECASE)


@cache
def build(folder: Path) -> Path:
    """Return the kernel's library in `folder`; build it if it is not there.

    Its name has the hash of all that it depends on: source, compiler, flags and processor.

    Raises:
        ConfigError: there is no compiler, or it does not build the source; the message says why.
        OSError: the folder cannot be written to.
        subprocess.SubprocessError: the compiler does not say its version.
    """
    path = folder / f"kernel-{_fingerprint(_command(_OWN_PROCESSOR))}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        compile_kernel(_OWN_PROCESSOR, path)
    return path


def compile_kernel(options: Sequence[str], path: Path) -> None:
    """Compile the source into `path`, which is complete or absent.

    Args:
        options: of the compiler, for the processor.
        path: the library, in a folder that exists.

    Raises:
        ConfigError: there is no compiler, or it does not build the source; the message says why.
    """
    command = _command(options)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        unfinished = Path(temporary) / path.name
        _compile([*command, "-o", str(unfinished)])
        unfinished.rename(path)


def _command(options: Sequence[str]) -> list[str]:
    """The compiler and its arguments. Raises ConfigError if there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ConfigError(
            "there is no C++ compiler", field="kernel", value="on", allowed="c++ or g++ on the PATH"
        )
    return [compiler, *OPTIONS, *options, str(SOURCE), "-Wl,--as-needed", *openmp_libraries()]


def openmp_libraries() -> list[str]:
    """The OpenMP library that torch has loaded: a second one would run threads of its own."""
    libraries = Path(torch.__file__).parent / "lib"
    return [str(path) for path in sorted(libraries.glob("libgomp*"))]


def _fingerprint(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    texts = [*command, platform.machine(), _processor()]
    parts = [SOURCE.read_bytes(), *(text.encode() for text in texts), version]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on: the description of a core without what varies by core."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()[:40]
    return "".join(line for line in lines if not _VARIES_BY_CORE.match(line))


def _compile(command: list[str]) -> None:
    """Raises ConfigError with the compiler's own words."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        message = f"{command[0]} does not build the kernel: {run.stderr.strip()[:500]}"
        raise ConfigError(
            message, field="kernel", value="on", allowed="a compiler of C++20 with OpenMP"
        )
