"""Kernels that were built before: an image has one for each class of processors, and no compiler.

`python -m server.engine.native.prebuilt_kernel` builds them for the machine that it runs on.
"""

import hashlib
import platform
import sys
from pathlib import Path

from server.engine.native import kernel_build
from server.engine.native.cpu_class import CpuClass, classes_of

PREBUILT = Path(__file__).with_name("prebuilt")


def find_prebuilt(cpu_class: CpuClass) -> Path | None:
    """The library of a class in `PREBUILT`; None if there is none.

    A library of another source, of other options or for another build of torch is not found.
    """
    path = _path(cpu_class)
    return path if path.exists() else None


def build_all() -> list[Path]:
    """Build the library of every class of this machine into `PREBUILT`.

    Raises ConfigError if there is no compiler, or it does not build the source.
    """
    PREBUILT.mkdir(exist_ok=True)
    built = []
    for cpu_class in classes_of(platform.machine()):
        path = _path(cpu_class)
        kernel_build.compile_kernel(cpu_class.options, path)
        built.append(path)
    return built


def _path(cpu_class: CpuClass) -> Path:
    """Where the library of a class is: its name has the hash of what it was built from."""
    openmp = [Path(library).name for library in kernel_build.openmp_libraries()]
    texts = [*kernel_build.OPTIONS, *cpu_class.options, *openmp]
    parts = [kernel_build.source_bytes(), *(text.encode() for text in texts)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return PREBUILT / f"kernel-{cpu_class.name}-{digest}.so"


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in build_all())
