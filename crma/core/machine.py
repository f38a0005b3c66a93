"""What a bug report has to say about a machine."""

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from crma.core.cache import cache_home, setting_names
from crma.core.provenance import commit, hardware

PACKAGES = (
    "crma-server",
    "crma-client",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "fastapi",
    "uvicorn",
    "pydantic",
    "httpx",
)
_CPU_INFO = Path("/proc/cpuinfo")
_ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "asimd", "bf16")


def describe() -> dict[str, Any]:
    """Versions, hardware with the instructions that matter here, pulled models, settings' names."""
    return {
        "commit": commit(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": hardware_in_detail(),
        "compiler": shutil.which("c++") or shutil.which("g++") or "none",
        "home": str(cache_home()),
        "models": sorted(path.parent.name for path in cache_home().glob("models/*/base.json")),
        "settings": setting_names(),
    }


def hardware_in_detail() -> dict[str, Any]:
    """As `provenance.hardware`, with "isa", the instructions that matter here, and "memory_gib"."""
    return {**hardware(), "isa": _isa(), "memory_gib": _memory_gib()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _isa() -> list[str]:
    """The instruction sets among those that kernels use, as Linux names them; none elsewhere."""
    if not _CPU_INFO.exists():
        return []
    words = set(_CPU_INFO.read_text().split())
    return [name for name in _ISA if name in words]


def _memory_gib() -> float | None:
    """Main memory in GiB, where POSIX reports it."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
