"""Signs the versions of a store, each once its files are known to be sound."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from crma.core.errors import NotFound
from crma.core.files import names_in
from crma.store.adapter_store import AdapterStore
from crma.store.serving import Entry
from crma.store.signature import sign, signature_path
from crma.store.verification import check_entry


def sign_versions(
    store: AdapterStore, private_key: Path, places: Sequence[str] | None = None
) -> list[str]:
    """Signs versions of tasks and of the backbone.

    Args:
        store: the store.
        private_key: as that of `signature.sign`.
        places: `tasks/<name>/<version>` or `backbones/<version>`, which are signed again; None:
            every version that has no signature.

    Returns:
        The places that were signed.

    Raises:
        NotFound: there is no such version.
        StoreError: a version is damaged. Those before it are signed.
        ConfigError: as `signature.sign`.
        ReadOnlyStore: the store is a copy.
    """
    entries = {entry.manifest.place: entry for entry in _entries(store)}
    if places is None:
        places = [place for place in entries if not signature_path(store.root, place).exists()]
    for place in places:
        if place not in entries:
            message = f"There is no version {place}."
            raise NotFound(message, field="version", value=place, allowed=sorted(entries))
    root = store.writable_root()
    for place in places:
        check_entry(entries[place], None, None)
        sign(root, entries[place], private_key)
    return list(places)


def _entries(store: AdapterStore) -> Iterator[Entry]:
    """Every version, of the backbone first."""
    for version in store.backbone_versions():
        backbone = store.backbone(version)
        if backbone is not None:
            yield backbone
    for name in sorted(names_in(store.root, "tasks")):
        for version in store.task_versions(name):
            yield store.task(name, version)
