"""Files on disk: reads that refuse links and oversized files, writes that survive a crash."""

import errno
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from crma.core.errors import InvalidAdapter, NotFound, StoreError

TEMPORARY_PREFIX = ".publishing-"
MAX_JSON_BYTES = 4 * 2**20
LOCK = ".lock"
PRIVATE = 0o600  # the mode of a file that only its owner may read
_MAX_SHOWN = 200  # characters of an offending value in an error: a file can hold anything


def invalid(message: str, field: str, value: object, allowed: object) -> InvalidAdapter:
    """An InvalidAdapter whose message starts with the field; a long value is cut."""
    shown = value if isinstance(value, int | float | None) else str(value)[:_MAX_SHOWN]
    return InvalidAdapter(f"{field}: {message}", field=field, value=shown, allowed=allowed)


@contextmanager
def about(where: str) -> Iterator[None]:
    """Prefix the message of every StoreError raised in the block with `where`."""
    try:
        yield
    except StoreError as error:
        error.message = f"{where}: {error.message}"
        error.args = (error.message,)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file exactly once, so that the bytes checked are the bytes used.

    Args:
        path: the file. It must not be a link itself; its parent folders may be.
        limit: the largest accepted size in bytes, checked before anything is read.

    Raises:
        InvalidAdapter: the file is missing, a link, not a regular file, or larger than `limit`.
    """
    # O_NONBLOCK: opening a named pipe would otherwise wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise invalid("There is no such file.", path.name, path, "a file that exists") from error
    except OSError as error:
        message = f"Cannot be opened: {error.strerror}."
        raise invalid(message, path.name, path, "a plain file, not a link") from error
    with _closing(descriptor):
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise invalid("Not a plain file.", path.name, path, "a plain file")
        if status.st_size > limit:
            raise invalid("Too large.", path.name, status.st_size, f"<= {limit} bytes")
        return _read(descriptor, limit)


def read_plain(path: Path, limit: int = -1) -> bytes:
    """Read a file that somebody named, which may be a link, as Kubernetes' secrets are.

    Args:
        path: the file.
        limit: how many bytes to read at most; -1: all.

    Raises:
        OSError: it cannot be read, or is no plain file: a named pipe would be waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with _closing(descriptor):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        return _read(descriptor, limit)


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    """Close it in any case; `os.fdopen` leaves that of a folder open."""
    try:
        yield
    finally:
        os.close(descriptor)


def _read(descriptor: int, limit: int) -> bytes:
    with os.fdopen(descriptor, "rb", closefd=False) as stream:
        return stream.read(limit)


def plain_folder(root: Path, place: str) -> Path:
    """The path `root/place`, once every part of `place` is known to be a folder and not a link.

    Args:
        root: the store's folder, which may itself be a link.
        place: a path inside it, its parts separated by "/".

    Raises:
        NotFound: a part does not exist.
        InvalidAdapter: a part is a link, or is not a folder.
    """
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
    """The names in the folder `root/place`, in no order; empty if there is no such folder.

    Raises:
        InvalidAdapter: a part of `place` is a link, or is not a folder.
    """
    try:
        return os.listdir(plain_folder(root, place))
    except NotFound:
        return []


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object: UTF-8, with no key twice and only finite numbers.

    Raises:
        InvalidAdapter: `data` is anything else; the error's field is `where`.
    """
    try:
        parsed = json.loads(
            data.decode(),
            object_pairs_hook=_unique_keys,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        message = f"Not valid JSON: {error}."
        raise invalid(message, where, f"{len(data)} bytes", "one JSON object") from error
    if not isinstance(parsed, dict):
        raise invalid("Not a JSON object.", where, type(parsed).__name__, "one JSON object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def to_json(content: Mapping[str, Any] | BaseModel) -> bytes:
    """Readable JSON that ends in a newline. The same content always gives the same bytes.

    Pydantic models and dataclasses, also nested ones, are written as objects.

    Raises:
        InvalidAdapter: `content` holds NaN, an infinity, or a value that JSON cannot represent.
    """
    try:
        plain = to_jsonable_python(content, by_alias=True)
        text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()
    except (ValueError, TypeError, RecursionError) as error:
        message = f"Cannot be written: {error}."
        raise invalid(message, "JSON", content, "finite JSON values") from error


@contextmanager
def locked(root: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the only writer lock of a store, waiting for it if another writer has it.

    The lock file is created on first use, and the kernel releases the lock when its holder dies.
    No other writer can be active in the block, so whatever a dead writer left is deleted first.
    At its end the lock file gets another time: to see that something was written, readers need look
    at nothing else.

    Args:
        root: the store's folder.
        wait: False: raise BlockingIOError if another writer has the lock.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in root.glob(f"{TEMPORARY_PREFIX}*"):
            _remove(leftover)
        try:
            yield
        finally:
            _mark_written(descriptor)
    finally:
        os.close(descriptor)


def _mark_written(descriptor: int) -> None:
    now = time.time_ns()
    try:
        os.utime(descriptor, ns=(now, now))
    except PermissionError:  # only a file's owner may choose its time
        os.utime(descriptor)


def _remove(leftover: Path) -> None:
    """Remove a file or a folder that a writer left; if it cannot be removed, it stays."""
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        with suppress(OSError):
            leftover.unlink()


def publish_folder(root: Path, target: Path, files: Mapping[str, bytes]) -> None:
    """Create `target` with all `files` in one step: after a crash it is complete or absent.

    Args:
        root: the store's folder, on the same file system as `target`.
        target: the new folder, below `root`. It must not exist; only the writer lock ensures that.
        files: file name -> bytes, written in this order.
    """
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=root))
    try:
        for name, data in files.items():
            _write_synced(temporary / name, data)
        os.chmod(temporary, 0o755)
        sync_folder(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for folder in target.parents:
        sync_folder(folder)
        if folder == root:
            break


def replace_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace a file in one step: readers see the old bytes or the new ones, never a mixture.

    It has its mode, less what the umask takes away, before it has its bytes. Call it with the
    writer lock held: the name of the temporary file is fixed. If it cannot be written, nothing of
    it is left.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        _write_synced(temporary, data, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_record(path: Path, data: bytes) -> None:
    """Replace a file that several processes may write at once: readers see one of its versions.

    Nothing is made sure of for a crash. Raises OSError if it cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _write_synced(path: Path, data: bytes, mode: int = 0o666) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Make sure that the names in a folder survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
