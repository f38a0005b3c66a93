"""Folders for adapters that arrive in pieces: inside the store, and never taken for a version."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crma.core.files import locked

INCOMING_PREFIX = ".incoming-"


@contextmanager
def incoming_folder(root: Path) -> Iterator[Path]:
    """An empty folder on the store's file system, which is gone when the block ends.

    A process that dies in the block leaves its folder; the next call removes it. Each folder has a
    lock, which dies with its process, so that one that is still being filled stays.

    Args:
        root: of the store; made if it is missing.
    """
    with locked(root):  # so that no other call finds the new folder before it has its lock
        for leftover in root.glob(f"{INCOMING_PREFIX}*"):
            _remove_unless_locked(leftover)
        folder = Path(tempfile.mkdtemp(prefix=INCOMING_PREFIX, dir=root))
        descriptor = _open_locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_leftovers(root: Path) -> None:
    """Remove what writers and uploads that died left in a store; what is in use stays.

    It does nothing in a store that is read-only or not there, or while a writer is active: that one
    has removed its predecessors' leftovers itself.
    """
    if not root.is_dir():
        return
    with suppress(OSError), locked(root, wait=False):
        for leftover in root.glob(f"{INCOMING_PREFIX}*"):
            _remove_unless_locked(leftover)


def _open_locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock. Raises OSError if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_unless_locked(leftover: Path) -> None:
    with suppress(OSError):  # it is being filled, or its owner removes it just now
        descriptor = _open_locked(leftover)
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(descriptor)
