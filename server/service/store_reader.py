"""Reads a store again and again: of its versions, only those that may have changed.

To see whether anything has, a look costs the same however many versions there are.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar, cast

from crma.core.errors import StoreError
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.store.adapter_store import AdapterStore
from crma.store.channels import Channels
from crma.store.drift import promotion_drift
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone
from crma.store.signature import FOLDER as SIGNATURES
from crma.store.verification import SoundVersion
from crma.store.version_stamp import Stamp, file_stamp, folder_stamp
from server.service.store_view import StoreView
from server.service.store_watch import check_still_there, fingerprint
from server.service.suspects import Suspects

LOOKED_AT = 64  # folders of tasks that one look stamps

Entry = TypeVar("Entry", TaskEntry, BackboneEntry)


class StoreReader:
    """A store as it was read last. Its methods are called one at a time.

    Args:
        store: of adapters for `base`.
        shape: of the base; adapters must fit it.
        load_backbone: False: backbones are never read.
        report: is told of each problem that `read` finds.

    Attributes:
        suspects: the damaged versions.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: BaseModel,
        shape: ModelShape | None,
        load_backbone: bool,
        report: Callable[[StoreError], None],
    ) -> None:
        self.suspects = Suspects(store)
        self._store = store
        self._base = base
        self._shape = shape
        self._load_backbone = load_backbone
        self._report = report
        self._seen: object = None  # the fingerprint of what was read; None: read again
        self._sound: Mapping[str, SoundVersion] = {}  # by place
        self._stamps: Mapping[str, Stamp] = {}  # of the folders of tasks and of backbones
        self._next = 0  # the first of them that the next look stamps
        self._was_filled = False  # the store was read, and was not empty

    def verify(self) -> list[StoreError]:
        """Read every version, and return every problem. `read` need not read the sound ones."""
        found = self._store.examine(base=self._base, shape=self._shape)
        self._sound = {each.entry.manifest.place: each for each in found.sound}
        return found.problems

    def num_parameters(self, place: str) -> int:
        """Numbers in the tensors of a version; 0 if its weights were not read."""
        known = self._sound.get(place)
        return 0 if known is None else known.num_parameters

    def has_changed(self) -> bool:
        """Whether the store may be another than the one that was read.

        Whoever writes with the store's lock leaves a trace where every look finds it. What was
        copied into the store or taken out without it is found when its folder's turn comes.
        """
        if fingerprint(self._store.root) != self._seen or self.suspects.have_changed():
            return True
        folders = list(self._stamps)[self._next : self._next + LOOKED_AT]
        self._next = self._next + LOOKED_AT if len(folders) == LOOKED_AT else 0
        return any(self._stamp(folder) != self._stamps[folder] for folder in folders)

    def read(self) -> StoreView:
        """A view of the store as it is now. Raises StoreError or OSError if it cannot be read."""
        self._seen = None
        seen = fingerprint(self._store.root)
        channels = self._store.channels()
        if self._was_filled and not channels.history:
            check_still_there(self._store.root)
            channels = self._store.channels()  # it came back meanwhile
        self.suspects.begin()
        folders = ["backbones", *(f"tasks/{name}" for name in channels.tasks)]
        self._stamps = {folder: self._stamp(folder) for folder in folders}
        sound: dict[str, SoundVersion] = {}
        tasks = self._tasks(channels, sound)
        backbones = self._backbones(channels, sound) if self._load_backbone else {}
        self._sound = sound
        self._was_filled = self._was_filled or bool(channels.history)
        self._seen = seen
        drift = promotion_drift(channels)
        return StoreView(
            tasks, dict(channels.tasks), backbones, channels.backbone, drift, channels.history
        )

    def _tasks(
        self, channels: Channels, sound: dict[str, SoundVersion]
    ) -> dict[str, dict[str, TaskEntry | StoreError]]:
        """Every version of each task that serves; what is sound is added to `sound`."""
        tasks = {}
        for name, serving in channels.tasks.items():
            versions = dict.fromkeys((*self._store.task_versions(name), serving))
            read = partial(self._store.task, name)
            folder = f"tasks/{name}"
            tasks[name] = {each: self._checked(read, folder, each, sound) for each in versions}
        return tasks

    def _backbones(
        self, channels: Channels, sound: dict[str, SoundVersion]
    ) -> dict[str, BackboneEntry | StoreError]:
        """Every version of the backbone; what is sound is added to `sound`."""
        serving = () if channels.backbone is None else (channels.backbone,)
        versions = dict.fromkeys((*self._store.backbone_versions(), *serving))
        read = partial(read_backbone, self._store.root)
        return {each: self._checked(read, "backbones", each, sound) for each in versions}

    def _checked(
        self,
        read: Callable[[str], Entry],
        folder: str,
        version: str,
        sound: dict[str, SoundVersion],
    ) -> Entry | StoreError:
        """The entry of a version, or the problem with it: as it was read, if it looks the same."""
        place = f"{folder}/{version}"
        stamp = self._store.stamp(place)
        known = self._sound.get(place)
        if known is not None and known.stamp == stamp and not self.suspects.was_found(place):
            sound[place] = known
            return cast("Entry", known.entry)
        try:
            entry = read(version)
            entry.check_base(self._base.digest)
            self._store.check_signature(entry)
            sound[place] = SoundVersion(entry, stamp, entry.num_parameters(self._shape))
        except StoreError as error:
            self.suspects.add(place, stamp)
            self._report(error)
            return error
        return entry

    def _stamp(self, folder: str) -> Stamp:
        """The stamp of a folder of versions, and of their signatures."""
        root = self._store.root
        return file_stamp(root / folder), folder_stamp(root / SIGNATURES / folder)
