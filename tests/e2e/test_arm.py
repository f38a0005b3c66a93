"""The kernel as a server on Arm builds it. Its parts run in qemu in tests/numerics.

Debian's packages g++-aarch64-linux-gnu and qemu-user have the tools.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from other_processors import ARM_COMPILER, PACKAGES

from server.engine.native.cpu_class import GENERIC
from server.engine.native.kernel_build import NO_OPENMP, OPENMP, OPTIONS, SOURCE

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("threads", [OPENMP, NO_OPENMP])
def test_the_generic_kernel_is_built_for_arm(threads: str, tmp_path: Path) -> None:
    if shutil.which(ARM_COMPILER) is None:
        pytest.skip(f"apt-get install {PACKAGES[ARM_COMPILER]}")
    library = tmp_path / "kernel.so"
    options = [*OPTIONS, *GENERIC.options, threads]
    subprocess.run([ARM_COMPILER, *options, str(SOURCE), "-o", str(library)], check=True)
    assert library.read_bytes()[:20].endswith(b"\x03\x00\xb7\x00")  # a shared library for AArch64
