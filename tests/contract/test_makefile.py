"""The Makefile's targets that do more than start one command."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

SERVER = f"""#!{sys.executable}
import signal, sys
if "serve" not in sys.argv:
    sys.exit()
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), sys.exit(0)))
signal.alarm(10)
print("started", flush=True)
signal.pause()
"""


def test_a_signal_to_make_serve_stops_the_server(tmp_path: Path) -> None:
    """make ended and the server went on, which kept its port."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.installed", "crma", "python"):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(SERVER if name == "crma" else "#!/bin/sh\n")
        place.chmod(0o700)
    command = ["make", "--silent", "serve", f"BIN={tmp_path}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as make:
        assert make.stdout is not None
        assert make.stdout.readline() == "started\n"
        os.kill(make.pid, signal.SIGTERM)
        said = make.stdout.readline()
    assert said == "stopped\n"


PIP = """#!/bin/sh
case "$*" in *--upgrade*) exit 0;; esac
echo "Collecting torch==2.13.0 (from -c constraints.txt)"
echo "  Downloading torch-2.13.0-cp311.whl.metadata (29 kB)"
echo "  Downloading https://index/whl/torch-2.13.0-cp311.whl (180.2 MB)"
echo "Installing collected packages: torch"
exit {status}
"""


@pytest.mark.parametrize("status", [0, 3])
def test_making_the_environment_shows_its_large_downloads(tmp_path: Path, status: int) -> None:
    """Nothing was said for a minute or more."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "python", "pip"):
        place = tmp_path / name
        place.write_text(PIP.format(status=status) if name == "pip" else "#!/bin/sh\n")
        place.chmod(0o700)
    command = ["make", "--silent", "setup", f"BIN={tmp_path}", f"PYTHON={tmp_path / 'python'}"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.stdout.splitlines()[1:] == ["  torch-2.13.0-cp311.whl (180.2 MB)", "  installing"]
    assert (made.returncode == 0) == (status == 0)
    assert (tmp_path / ".venv" / ".installed").exists() == (status == 0)
