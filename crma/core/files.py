"""Bytes on disk: reads that refuse tricks, writes that survive a crash."""

import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from crma.core.errors import InvalidAdapter, NotFound, StoreError

TEMPORARY_PREFIX = ".publishing-"
MAX_JSON_BYTES = 4 * 2**20
_LOCK = ".lock"


def invalid(message: str, field: str, value: object, allowed: object) -> InvalidAdapter:
    """The error, its message led by the field; the value is cut, because it may be anything that was in a file."""
    shown = value if isinstance(value, int | float | None) else str(value)[:200]
    return InvalidAdapter(f"{field}: {message}", field=field, value=shown, allowed=allowed)


@contextmanager
def about(where: str) -> Iterator[None]:
    """Store errors raised inside say what they are about."""
    try:
        yield
    except StoreError as error:
        error.message = f"{where}: {error.message}"
        error.args = (error.message,)
        raise


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
        raise invalid(
            f"Cannot be opened: {error.strerror}.", path.name, path, "a plain file, not a link"
        ) from error
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise invalid("Not a plain file.", path.name, path, "a plain file")
        if status.st_size > limit:
            raise invalid("Too large.", path.name, status.st_size, f"<= {limit} bytes")
        return stream.read(limit)


def plain_folder(root: Path, place: str) -> Path:
    """`root/place`, of which every part is a folder and none is a link (`root` itself may be one)."""
    path = root
    for part in place.split("/"):
        path = path / part
        if not os.path.lexists(path):
            raise NotFound(
                "Not in the store.", field="path", value=place, allowed="a published version"
            )
        if path.is_symlink() or not path.is_dir():
            raise invalid("Not a folder of the store.", "path", path, "a folder, not a link")
    return path


def names_in(root: Path, place: str) -> list[str]:
    """What is in a folder of the store; nothing if there is no such folder. InvalidAdapter if it is a link."""
    try:
        return os.listdir(plain_folder(root, place))
    except NotFound:
        return []


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object: UTF-8, no key twice, only finite numbers. Raises InvalidAdapter that names `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text} is not finite")
        return number

    try:
        parsed = json.loads(
            data.decode(), object_pairs_hook=unique, parse_constant=finite, parse_float=finite
        )
    except (ValueError, RecursionError) as error:
        raise invalid(
            f"Not valid JSON: {error}.", where, f"{len(data)} bytes", "one JSON object"
        ) from error
    if not isinstance(parsed, dict):
        raise invalid("Not a JSON object.", where, type(parsed).__name__, "one JSON object")
    return parsed


def to_json(content: Mapping[str, Any] | BaseModel) -> bytes:
    """Readable JSON with a newline at the end; the same content gives the same bytes.

    Records (pydantic's and dataclasses, also inside `content`) are written as objects. Raises InvalidAdapter on NaN.
    """
    try:
        plain = to_jsonable_python(content, by_alias=True)
        return (
            json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        ).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise invalid(
            f"Cannot be written: {error}.", "JSON", content, "finite JSON values"
        ) from error


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the store's one writer lock, created on first use: waits for it; the kernel frees it when a holder dies.

    Deletes what writers that died have left: whoever holds the lock is the only one.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for leftover in root.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def publish_folder(root: Path, target: Path, files: Mapping[str, bytes]) -> None:
    """Makes `target` appear with all `files` or not at all, whenever the process or the machine dies.

    The last of `files` is written last. `target` (below `root`) must not exist; only a lock makes sure of that.
    """
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=root))
    try:
        for name, data in files.items():
            _write_synced(temporary / name, data)
        os.chmod(temporary, 0o755)
        _sync_folder(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for folder in target.parents:
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


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
