"""Programs in C++ for processors that this machine may not have, and what runs them.

Those with AVX-512, AVX512-BF16 and AMX run with their instructions emulated
(numerics/cpp/emulated_instructions.h), which checks indexing and padding, not the instructions. The
one for Arm is built by a cross-compiler and run by qemu.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from server.engine.native.kernel_build import SOURCE

CPP = Path(__file__).parent / "numerics" / "cpp"
ARM_COMPILER = "aarch64-linux-gnu-g++"
_EMULATED = ["-march=x86-64-v3", "-include", str(CPP / "emulated_instructions.h")]
PROCESSORS = {  # how to compile for it, and what runs the program
    "avx512-bf16-emulated": (["g++", *_EMULATED], []),
    "amx-emulated": (["g++", *_EMULATED, "-DEMULATE_AMX"], []),
    "arm": ([ARM_COMPILER, "-static"], ["qemu-aarch64"]),
}
PACKAGES = {"g++": "g++", ARM_COMPILER: "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}


def compiled(processor: str, source: str, folder: Path) -> list[str]:
    """Compile a program of `numerics/cpp`, and return the command that runs it.

    Skips the test where a tool is not installed.

    Args:
        folder: receives the program.
    """
    compiler, runner = PROCESSORS[processor]
    for tool in (compiler[0], *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: apt-get install {PACKAGES[tool]}")
    program = folder / processor
    options = ["-std=c++20", "-O1", "-Wno-psabi", "-ffp-contract=fast", f"-I{SOURCE.parent}"]
    command = [*compiler, *options, str(CPP / source), "-o", str(program)]
    subprocess.run(command, check=True)
    return [*runner, str(program)]
