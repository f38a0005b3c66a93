"""What a version looks like without reading it: its stamp is another once a file of it is."""

from __future__ import annotations

import os
from pathlib import Path

from crma.store.signature import signature_path

FileStamp = tuple[int, int, int]  # time of the last change in ns, inode, bytes
Stamp = tuple[object, ...]


def file_stamp(path: Path) -> FileStamp | None:
    """The stamp of a file or folder; None if it is not there, or cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def folder_stamp(folder: Path) -> Stamp:
    """The names and stamps of all that is in a folder, links as such; empty if it is not there."""
    try:
        with os.scandir(folder) as files:
            stats = [(file.name, file.stat(follow_symlinks=False)) for file in files]
    except OSError:
        return ()
    return tuple(sorted((name, s.st_mtime_ns, s.st_ino, s.st_size) for name, s in stats))


def version_stamp(root: Path, place: str, public_key: Path | None = None) -> Stamp:
    """The stamp of a version.

    Args:
        root: of the store.
        place: of the version, relative to `root`.
        public_key: if given, the stamp has that of the signature and of this file too.
    """
    files = folder_stamp(root / place)
    if public_key is None:
        return files
    return files, file_stamp(signature_path(root, place)), file_stamp(public_key)
