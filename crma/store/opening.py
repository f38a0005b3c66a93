"""Opens the adapter store of a folder or an address, or starts a new one in a folder.

A mistyped path must not be a store.
"""

import re
from pathlib import Path

from crma.core.cache import cache_home
from crma.core.digests import bytes_digest
from crma.core.errors import NotFound, StoreError
from crma.core.files import LOCK, TEMPORARY_PREFIX, locked
from crma.store.adapter_store import AdapterStore
from crma.store.channels import CHANNELS, Channels, write_channels
from crma.store.incoming import INCOMING_PREFIX
from crma.store.mirror import Mirror
from crma.store.source import Source, is_address, read_only

MARKS = (CHANNELS, "tasks", "backbones")


def is_store(root: Path) -> bool:
    """Whether a folder holds any of what only a store holds."""
    return any((root / mark).exists() for mark in MARKS)


def open_store(
    place: Path | str, public_key: Path | None = None, home: Path | None = None
) -> AdapterStore:
    """The store in a folder, or a copy of the one at an address, as far as it can be copied now.

    Args:
        place: the folder, or the address.
        public_key: as that of `AdapterStore`.
        home: has the copies of stores; None: the cache folder.

    Raises:
        NotFound: the folder is no store.
        ConfigError: no store can have this address, or its package is not installed.
        StoreError: there is no copy yet, and none can be made now.
    """
    if is_address(place):
        return _copied(str(place), public_key, home or cache_home())
    root = Path(place)
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


def writable_store(place: Path | str) -> AdapterStore:
    """The store that a publication goes to, which makes the folder if it is missing.

    Raises:
        ReadOnlyStore: it is named by an address.
        StoreError: the folder holds something that is no store.
    """
    if is_address(place):
        raise read_only(str(place))
    root = Path(place)
    if not is_store(root) and not _may_become_store(root):
        message = f"{root} holds something else than an adapter store."
        allowed = "a folder that is a store, empty or missing"
        raise StoreError(message, field="store", value=str(root), allowed=allowed)
    return AdapterStore(root)


def start_store(place: Path | str) -> AdapterStore:
    """Make an empty store. A store stays as it is. Raises as `writable_store`."""
    store = writable_store(place)
    if not is_store(store.root):
        with locked(store.root):
            write_channels(store.root, Channels())
    return store


def _copied(address: str, public_key: Path | None, home: Path) -> AdapterStore:
    """A store on another machine, copied into a folder of its own. Raises as `open_store`."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", address)[:64].strip("-.")
    digest = bytes_digest(address.rstrip("/").encode()).removeprefix("sha256:")
    mirror = Mirror(Source.at(address), home / "mirrors" / f"{name}-{digest[:12]}")
    problems = mirror.copy()
    if not (mirror.root / CHANNELS).exists():
        raise problems[0]
    return AdapterStore(mirror.root, public_key, mirror)


def _may_become_store(root: Path) -> bool:
    """Whether a folder is missing, or holds at most what a writer that died leaves."""
    if not root.exists():
        return True
    return root.is_dir() and all(_is_leftover(path.name) for path in root.iterdir())


def _is_leftover(name: str) -> bool:
    return name == LOCK or name.startswith((TEMPORARY_PREFIX, INCOMING_PREFIX))
