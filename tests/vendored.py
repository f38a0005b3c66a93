"""Files of npm packages that this repository holds as they were published."""

import hashlib
import json
from pathlib import Path
from typing import Any

LIST = "packages.json"
"""Of a folder `vendor`: each package with version, licence, digest of its tarball, and files."""


def packages(folder: Path) -> dict[str, Any]:
    return json.loads((folder / LIST).read_text())


def listed(folder: Path) -> dict[str, str]:
    """Path -> digest of every file that the list of a folder names."""
    files: dict[str, str] = {}
    for package in packages(folder).values():
        files |= {path: file["digest"] for path, file in package["files"].items()}
    return files


def found(folder: Path) -> dict[str, str]:
    """Path -> digest of every file that is in a folder, but for its list."""
    digests = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != LIST:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            digests[path.relative_to(folder).as_posix()] = f"sha256:{digest}"
    return digests
