"""What the server knows of the store: a reading of it, which requests resolve their names in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

from crma.core.errors import StoreError
from crma.store.channels import BACKBONE, Change, task_channel
from crma.store.entry import BackboneEntry, TaskEntry
from crma.store.serving import lineage_problem

Entry = TypeVar("Entry", TaskEntry, BackboneEntry)


@dataclass(frozen=True)
class VersionRecord(Generic[Entry]):
    """What the store has of a task, or of the backbone.

    versions: the oldest first; the reason for one that may not serve. serving: one of them, or
    None. history: which served, and why that changed, the oldest first.
    """

    versions: Mapping[str, Entry | StoreError]
    serving: str | None
    history: Sequence[Change]


@dataclass(frozen=True)
class StoreView:
    """The store as it was read: by version, the entry, or the reason why it may not serve.

    tasks: by name, then version. serving: the serving version of each task. history: what served
    before, the oldest change first.
    """

    tasks: Mapping[str, Mapping[str, TaskEntry | StoreError]] = field(default_factory=dict)
    serving: Mapping[str, str] = field(default_factory=dict)
    backbones: Mapping[str, BackboneEntry | StoreError] = field(default_factory=dict)
    serving_backbone: str | None = None
    drift: Mapping[str, float] = field(default_factory=dict)  # `promotion_drift`
    history: Sequence[Change] = ()

    @property
    def backbone(self) -> BackboneEntry | StoreError | None:
        """The backbone that serves."""
        if self.serving_backbone is None:
            return None
        return self.backbones.get(self.serving_backbone)

    def sound_tasks(self) -> list[TaskEntry]:
        """Every version of every task that may serve, by name and version."""
        found = []
        for _, versions in sorted(self.tasks.items()):
            found += [entry for entry in versions.values() if isinstance(entry, TaskEntry)]
        return found

    def num_refused(self) -> int:
        """How many versions may not serve."""
        entries = [entry for versions in self.tasks.values() for entry in versions.values()]
        return sum(isinstance(entry, StoreError) for entry in (*entries, *self.backbones.values()))

    def sound_backbones(self) -> list[BackboneEntry]:
        """Every version of the backbone that may serve."""
        return [entry for entry in self.backbones.values() if isinstance(entry, BackboneEntry)]

    def task_record(self, name: str) -> VersionRecord[TaskEntry]:
        """Of a task that serves."""
        return self._record(self.tasks[name], self.serving[name], task_channel(name))

    def backbone_record(self) -> VersionRecord[BackboneEntry]:
        """Of the backbone."""
        return self._record(self.backbones, self.serving_backbone, BACKBONE)

    def _record(
        self, versions: Mapping[str, Entry | StoreError], serving: str | None, channel: str
    ) -> VersionRecord[Entry]:
        by_age = sorted(versions, key=lambda version: int(version.removeprefix("v")))
        changes = [each for each in self.history if each.channel == channel]
        return VersionRecord({each: versions[each] for each in by_age}, serving, changes)

    @cached_property
    def problems(self) -> dict[str, StoreError]:
        """Why the serving version of a task cannot answer as it was trained, by name, in order."""
        found = {name: self._problem(name) for name in sorted(self.tasks)}
        return {name: problem for name, problem in found.items() if problem is not None}

    def _problem(self, name: str) -> StoreError | None:
        entry = self.tasks[name][self.serving[name]]
        if isinstance(entry, StoreError):
            return entry
        backbone = self.backbone
        if not isinstance(backbone, StoreError):
            return lineage_problem(entry, backbone)
        return None if entry.manifest.backbone is None else backbone

    def serving_tasks(self) -> dict[str, TaskEntry]:
        """The serving version of each task, where it is sound, by name."""
        sound = self.sound_tasks()
        return {entry.name: entry for entry in sound if self.serving[entry.name] == entry.version}

    def serving_entries(self) -> dict[str | None, TaskEntry | BackboneEntry]:
        """What serves and is sound: tasks by name, the backbone under None."""
        entries: dict[str | None, TaskEntry | BackboneEntry] = {}
        entries.update(self.serving_tasks())
        if isinstance(self.backbone, BackboneEntry):
            entries[None] = self.backbone
        return entries
