"""Opens the adapter store of a folder, or starts a new one: a mistyped path must not be a store."""

from pathlib import Path

from crma.core.errors import NotFound, StoreError
from crma.core.files import LOCK, TEMPORARY_PREFIX, locked
from crma.store.adapter_store import AdapterStore
from crma.store.channels import CHANNELS, Channels, write_channels
from crma.store.incoming import INCOMING_PREFIX

MARKS = (CHANNELS, "tasks", "backbones")


def is_store(root: Path) -> bool:
    """Whether a folder holds any of what only a store holds."""
    return any((root / mark).exists() for mark in MARKS)


def open_store(root: Path, public_key: Path | None = None) -> AdapterStore:
    """The store in a folder. Raises NotFound if it is none.

    Args:
        root: the folder.
        public_key: as that of `AdapterStore`.
    """
    if is_store(root):
        return AdapterStore(root, public_key)
    if root.is_dir():
        message = f"{root} is no adapter store: it holds none of {', '.join(MARKS)}."
    else:
        message = f"There is no folder {root}."
    if _may_become_store(root):
        message += f" To start a new store there: `crma store init --store {root}`."
    allowed = "the folder of an adapter store"
    raise NotFound(message, field="store", value=str(root), allowed=allowed)


def writable_store(root: Path) -> AdapterStore:
    """The store that a publication goes to, which makes the folder if it is missing.

    Raises:
        StoreError: the folder holds something that is no store.
    """
    if not is_store(root) and not _may_become_store(root):
        message = f"{root} holds something else than an adapter store."
        allowed = "a folder that is a store, empty or missing"
        raise StoreError(message, field="store", value=str(root), allowed=allowed)
    return AdapterStore(root)


def start_store(root: Path) -> AdapterStore:
    """Make an empty store. A store stays as it is. Raises as `writable_store`."""
    store = writable_store(root)
    if not is_store(root):
        with locked(root):
            write_channels(root, Channels())
    return store


def _may_become_store(root: Path) -> bool:
    """Whether a folder is missing, or holds at most what a writer that died leaves."""
    if not root.exists():
        return True
    return root.is_dir() and all(_is_leftover(path.name) for path in root.iterdir())


def _is_leftover(name: str) -> bool:
    return name == LOCK or name.startswith((TEMPORARY_PREFIX, INCOMING_PREFIX))
