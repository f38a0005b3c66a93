"""Versions of the store that were found damaged, and are to be read again once they change.

A file that is mended in place changes neither `channels.json` nor the list of versions, and damage
that a load finds changes nothing at all.
"""

from typing import TYPE_CHECKING

from crma.core.errors import StoreError
from crma.models.model_shape import ModelShape
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry
from crma.store.version_stamp import Stamp

if TYPE_CHECKING:
    from crma.method.backbone import Backbone
    from crma.method.lora import Lora
    from server.engine.inference_engine import Loader


class Suspects:
    """The damaged versions of a store by place, each with its stamp before it was read."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._found: dict[str, Stamp | None] = {}
        self._earlier: dict[str, Stamp | None] = {}

    def begin(self) -> None:
        """The store is read from here on: those found earlier are found again, or no more."""
        self._earlier = self._found
        self._found = {}

    def add(self, place: str, seen: Stamp | None) -> None:
        """A version is damaged. `seen` is its stamp before it was read; None: read it again."""
        self._found[place] = seen

    def was_found(self, place: str) -> bool:
        """Whether a version was damaged before this reading of the store."""
        return place in self._earlier

    def have_changed(self) -> bool:
        """Whether a damaged version may be another by now."""
        return any(self._store.stamp(place) != seen for place, seen in list(self._found.items()))

    def loader(self, entry: TaskEntry | BackboneEntry, shape: ModelShape | None) -> "Loader":
        """Loads an entry for the engine. Damage that it finds is kept, and raised."""

        def load() -> "Lora | Backbone":
            try:
                return entry.load(shape)
            except StoreError:
                self.add(entry.manifest.place, None)
                raise

        return load
