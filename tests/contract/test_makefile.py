"""The Makefile's targets that do more than start one command."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

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
