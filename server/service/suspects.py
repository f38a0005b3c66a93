"""Versions of the store that were found damaged, and are to be read again once they change.

A file that is mended in place changes neither `channels.json` nor the list of versions, and damage
that a load finds changes nothing at all.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from crma.core.errors import StoreError
from crma.models.model_shape import ModelShape
from crma.store.entry import BackboneEntry, TaskEntry

if TYPE_CHECKING:
    from crma.method.backbone import Backbone
    from crma.method.lora import Lora
    from server.engine.inference_engine import Loader

Signature = tuple[tuple[str, int, int, int], ...]


class Suspects:
    """The damaged versions by folder, each with what its files looked like before it was read."""

    def __init__(self) -> None:
        self._found: dict[Path, Signature | None] = {}
        self._earlier: dict[Path, Signature | None] = {}

    def begin(self) -> None:
        """The store is read from here on: those found earlier are found again, or no more."""
        self._earlier = self._found
        self._found = {}

    def add(self, folder: Path, seen: Signature | None) -> None:
        """A version is damaged. `seen` is its signature before it was read; None: read it again."""
        self._found[folder] = seen

    def was_found(self, folder: Path) -> bool:
        """Whether a version was damaged before this reading of the store."""
        return folder in self._earlier

    def have_changed(self) -> bool:
        """Whether a damaged version may be another by now."""
        return any(signature(folder) != seen for folder, seen in list(self._found.items()))

    def loader(self, entry: TaskEntry | BackboneEntry, shape: ModelShape | None) -> "Loader":
        """Loads an entry for the engine. Damage that it finds is kept, and raised."""

        def load() -> "Lora | Backbone":
            try:
                return entry.load(shape)
            except StoreError:
                self.add(entry.path, None)
                raise

        return load


def signature(folder: Path) -> Signature:
    """What the files of a folder look like without reading them; nothing if it is not there."""
    try:
        with os.scandir(folder) as files:
            stats = [(file.name, file.stat(follow_symlinks=False)) for file in files]
    except OSError:
        return ()
    return tuple(sorted((name, s.st_mtime_ns, s.st_ino, s.st_size) for name, s in stats))
