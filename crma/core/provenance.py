"""The provenance of a measurement: the machine it ran on, and the commit of the code."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CPU_INFO = Path("/proc/cpuinfo")
MACHINE = ("cpu", "capability", "gpu")  # of `hardware`: the keys of `machine_class`


def hardware() -> dict[str, Any]:
    """The machine and torch's view of it: "cpu", "cores", "threads", "capability" and "gpu"."""
    import torch  # here, because importing it takes seconds

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def machine_class(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What of `hardware` a loss depends on beside the dtype: where there is a GPU, only on that."""
    decides = ("gpu",) if machine["gpu"] else MACHINE
    return {key: machine[key] if key in decides else None for key in MACHINE}


def _cpu_name() -> str:
    """The CPU's model name where Linux reports one, otherwise its architecture."""
    if _CPU_INFO.exists():
        model_name = re.search(r"^model name\s*: (.*)", _CPU_INFO.read_text(), re.MULTILINE)
        if model_name:
            return model_name[1]
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this source tree, abbreviated to 12 digits.

    Returns:
        The digits, followed by "-dirty" if the tree has uncommitted changes; "unknown" outside a
        repository or without git.
    """
    root = Path(__file__).parents[2]
    if not shutil.which("git") or not (root / ".git").exists():
        return "unknown"
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
