"""Where a figure comes from: the machine, the commit."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(
        r"^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE
    )
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str:
    """The commit of this source tree, with -dirty where it has changes; "unknown" outside a repository."""
    root = Path(__file__).parents[2]
    if not shutil.which("git") or not (root / ".git").exists():
        return "unknown"
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    return (
        subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
        or "unknown"
    )
