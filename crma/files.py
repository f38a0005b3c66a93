"""Bytes on disk: reads that refuse tricks, writes that survive a crash."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crma.errors import InvalidAdapter

TEMPORARY_PREFIX = ".publishing-"
_LOCK = ".lock"


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file, read once, so that what is checked is what is used.

    Args:
        path: its last part must not be a link; nothing that is not a plain file (a pipe would block) is opened.
        limit: most bytes accepted, checked before any is read.

    Raises:
        InvalidAdapter: missing, a link, not a plain file, or larger than `limit`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidAdapter(
            f"Cannot be opened: {error.strerror}.", field=path.name, value=str(path), allowed="a plain file, not a link"
        ) from error
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidAdapter("Not a plain file.", field=path.name, value=str(path), allowed="a plain file")
        if status.st_size > limit:
            raise InvalidAdapter("Too large.", field=path.name, value=status.st_size, allowed=f"<= {limit} bytes")
        return stream.read(limit)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object: UTF-8, no key twice, no NaN or Infinity. Raises InvalidAdapter that names `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def finite(constant: str) -> float:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{where}: not valid JSON: {error}.", field=where, allowed="one JSON object") from error
    if not isinstance(parsed, dict):
        raise InvalidAdapter(
            f"{where}: not a JSON object.", field=where, value=type(parsed).__name__, allowed="one JSON object"
        )
    return parsed


def to_json(content: Mapping[str, Any]) -> bytes:
    """Readable JSON with a newline at the end; the same content gives the same bytes. Raises InvalidAdapter on NaN."""
    try:
        return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidAdapter(f"Cannot be written as JSON: {error}.", allowed="finite JSON values") from error


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the store's one writer lock, created on first use: waits for it; the kernel frees it when a holder dies."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def publish_folder(root: Path, target: Path, files: Mapping[str, bytes]) -> None:
    """Makes `target` appear with all `files` or not at all, whenever the process or the machine dies.

    The last of `files` is written last. Call with the lock held; `target` (below `root`) must not exist.
    """
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=root))
    try:
        for name, data in files.items():
            _write_synced(temporary / name, data)
        os.chmod(temporary, 0o755)
        _sync_folder(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary, target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for folder in (target.parent, *target.parent.parents):
        _sync_folder(folder)
        if folder == root:
            break


def replace_file(path: Path, data: bytes) -> None:
    """Readers see the old bytes or the new ones, never a mixture. Call with the lock held."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    temporary.unlink(missing_ok=True)
    _write_synced(temporary, data)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def remove_leftovers(root: Path) -> tuple[str, ...]:
    """Deletes what killed writers left, and returns the names. Call with the lock held: then no writer is alive."""
    leftovers = sorted(root.glob(f"{TEMPORARY_PREFIX}*"))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return tuple(path.name for path in leftovers)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
