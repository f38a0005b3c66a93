"""Builds the native kernel from `kernel.cpp`, once for a machine: about a second."""

import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from crma.core.errors import ConfigError

SOURCE = Path(__file__).with_name("kernel.cpp")
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
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
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
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ConfigError(
            "there is no C++ compiler", field="kernel", value="on", allowed="c++ or g++ on the PATH"
        )
    command = [compiler, *FLAGS, str(SOURCE), "-Wl,--as-needed", *_openmp_libraries()]
    path = folder / f"kernel-{_fingerprint(command)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            unfinished = Path(temporary) / path.name
            _compile([*command, "-o", str(unfinished)])
            unfinished.rename(path)
    return path


def _openmp_libraries() -> list[str]:
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
