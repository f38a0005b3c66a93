"""server.engine.native.freed_memory: what is freed goes back, where there is a way to say so."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from server.engine.native.freed_memory import return_freed_memory

# Many blocks too small to be mapped one by one, and a last one that keeps the heap from shrinking.
SCRIPT = """
from pathlib import Path
from server.engine.native.freed_memory import return_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

blocks = [bytearray(100_000) for _ in range(2_000)]
last = bytearray(100_000)
del blocks
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs Linux with glibc",
)
def test_freed_memory_returns_to_the_system() -> None:
    """A server held 190 MiB of what loading the model had freed."""
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    assert int(run.stdout) > 100_000  # KiB


def test_a_system_that_need_not_be_told_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    return_freed_memory()
