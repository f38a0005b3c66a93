"""What pip installs: the packages with all files that they read."""

import subprocess
import sys
from pathlib import Path

from paths import ROOT

ROOMS = ("crma", "server")
LEFT_OUT = {"crma/results/plots"}  # pictures of the documents
MADE = {"__pycache__", "prebuilt"}  # by Python; by the image


def files_below(root: Path) -> set[str]:
    """Paths of the files of both packages, relative to `root`."""
    found = {path.relative_to(root) for room in ROOMS for path in (root / room).rglob("*")}
    return {
        path.as_posix()
        for path in found
        if (root / path).is_file()
        and not MADE.intersection(path.parts)
        and path.parent.as_posix() not in LEFT_OUT
    }


def test_a_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    """setuptools packs files other than .py only if pyproject.toml names them."""
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()"]
    command += ["-q", "egg_info", "-e", str(tmp_path), "build_py", "-d", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert files_below(tmp_path / "lib") == files_below(ROOT)
