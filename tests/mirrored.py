"""Copies of stores, as `crma.store.mirror` makes them, from a folder in place of a bucket."""

from collections import Counter
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from crma.store.adapter_store import AdapterStore
from crma.store.mirror import Mirror
from crma.store.source import Source, SourceFile

ADDRESS = "s3://bucket/store"


class FolderSource(Source):
    """A folder as a source, which counts what it is asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ADDRESS, LocalFileSystem(), str(folder))
        self.asked: Counter[str] = Counter()

    def file(self, name: str) -> SourceFile:
        self.asked["file"] += 1
        return super().file(name)

    def files(self) -> dict[str, SourceFile]:
        self.asked["files"] += 1
        return super().files()

    def read(self, name: str) -> bytes:
        self.asked["read"] += 1
        return super().read(name)


def mirrored(
    folder: Path, root: Path, public_key: Path | None = None, **options: Any
) -> AdapterStore:
    """The store in a folder, copied to `root`. Options are those of `Mirror`."""
    mirror = Mirror(FolderSource(folder), root, **options)
    mirror.copy()
    return AdapterStore(root, public_key, mirror)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a store but those of writers, by its name."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".")}
