"""Builds the native kernel from `cpp/`, once for a machine: some seconds."""

import hashlib
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from crma.core.errors import ConfigError
from crma.core.files import TEMPORARY_PREFIX, locked
from server.engine.native.cpu_class import CpuClass

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpp" / "kernel.cpp"  # includes the headers beside it
OPTIONS = (  # of the compiler, whatever the processor
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-fPIC",
    "-shared",
)
OPENMP = "-fopenmp"
NO_OPENMP = "-fopenmp-simd"  # the kernel's loops are vector code, on one thread


@cache
def build(folder: Path, cpu_class: CpuClass) -> Path:
    """Return the kernel's library for a class in `folder`; build it if it is not there.

    Its name has the hash of all that it depends on: source, compiler and options. Of processes that
    need it at the same time, one builds it and the others wait.

    Raises:
        ConfigError: there is no compiler, or it does not build the source; the message says why.
        OSError: the folder cannot be written to.
        subprocess.SubprocessError: the compiler does not say its version.
    """
    path = folder / f"kernel-{cpu_class.name}-{_fingerprint(_command(cpu_class.options))}.so"
    if path.exists():
        return path
    with locked(folder):
        if not path.exists():
            logger.info("building the native kernel for %s, once: some seconds", cpu_class.name)
            compile_kernel(cpu_class.options, path)
    return path


def source_bytes() -> bytes:
    """All that is compiled, one file after the other."""
    files = [*SOURCE.parent.glob("*.cpp"), *SOURCE.parent.glob("*.h")]
    return b"".join(path.read_bytes() for path in sorted(files))


def compile_kernel(options: Sequence[str], path: Path) -> None:
    """Compile the source into `path`, which is complete or absent.

    Args:
        options: of the compiler, for the processor.
        path: the library, in a folder that exists.

    Raises:
        ConfigError: there is no compiler, or it does not build the source; the message says why.
    """
    command = _command(options)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent) as temporary:
        unfinished = Path(temporary) / path.name
        try:
            _compile([*command, OPENMP, "-o", str(unfinished), *_linked()])
        except ConfigError:
            # Apple's compiler, for one, has no OpenMP of its own.
            _compile([*command, NO_OPENMP, "-o", str(unfinished)])
        unfinished.rename(path)


def _command(options: Sequence[str]) -> list[str]:
    """The compiler and its arguments. Raises ConfigError if there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ConfigError(
            "there is no C++ compiler", field="kernel", value="on", allowed="c++ or g++ on the PATH"
        )
    return [compiler, *OPTIONS, *options, str(SOURCE)]


def _linked() -> list[str]:
    return ["-Wl,--as-needed", *openmp_libraries()]


def openmp_libraries() -> list[str]:
    """The OpenMP library that torch has loaded: a second one would run threads of its own."""
    libraries = Path(torch.__file__).parent / "lib"
    return [str(path) for path in sorted(libraries.glob("libgomp*"))]


def _fingerprint(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    texts = [*command, OPENMP, *_linked()]
    parts = [source_bytes(), *(text.encode() for text in texts), version]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _compile(command: list[str]) -> None:
    """Raises ConfigError with the compiler's own words."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        message = f"{command[0]} does not build the kernel: {run.stderr.strip()[:500]}"
        raise ConfigError(message, field="kernel", value="on", allowed="a compiler of C++20")
