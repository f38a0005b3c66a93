"""Task names -> digests: which adapters a request means, whether they may serve here, and what the store says now.

Names are only ever looked up in a view of the store that was read before; a request never touches the file system.
A view is replaced whole, so a request sees all of a publication or nothing of it, and once what serves from then on is
in memory where its predecessor was. Running requests keep the digests they began with.
"""

import asyncio
import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from crma.core.errors import NotFound, StoreError
from crma.core.selection import AdapterSelection
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.models.prompts import PromptFormat
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone
from server.engine.native.adapter_pool import AdapterPool
from server.service.errors import NoBackbone
from server.service.metrics import Metrics

log = logging.getLogger("server")

Entry = TypeVar("Entry", TaskEntry, BackboneEntry)


@dataclass(frozen=True)
class Resolved:
    """What a request uses. `prompt_format` None: the base model has no chat template, only raw prompts work."""

    task: TaskEntry | None
    selection: AdapterSelection
    prompt_format: PromptFormat | None


@dataclass(frozen=True)
class _View:
    """The store as it was read: entries, or why one may not serve, by version; `tasks`: by name before that."""

    tasks: Mapping[str, Mapping[str, TaskEntry | StoreError]] = field(default_factory=dict)
    serving: Mapping[str, str] = field(default_factory=dict)
    backbones: Mapping[str, BackboneEntry | StoreError] = field(default_factory=dict)
    serving_backbone: str | None = None

    @property
    def backbone(self) -> BackboneEntry | StoreError | None:
        """The one that serves."""
        return self.backbones.get(self.serving_backbone or "")

    def sound(self) -> list[TaskEntry]:
        """Every version of a task that may serve, by name and version."""
        entries = (
            entry for _, versions in sorted(self.tasks.items()) for entry in versions.values()
        )
        return [entry for entry in entries if isinstance(entry, TaskEntry)]

    def served(self) -> dict[str | None, TaskEntry | BackboneEntry]:
        """What serves and is sound: tasks by name, the backbone under None."""
        served: dict[str | None, TaskEntry | BackboneEntry] = {}
        served |= {
            entry.name: entry for entry in self.sound() if self.serving[entry.name] == entry.version
        }
        return served | ({None: self.backbone} if isinstance(self.backbone, BackboneEntry) else {})


@dataclass(eq=False)
class Registry:
    """The view, kept fresh.

    Args:
        store: looked at every `poll_s` seconds.
        base: the model that serves.
        pool: the engine's; it is told how to load what appears.
        base_format: its chat format; also for adapters that recorded none.
        shape: of the base model; adapters must fit it.
        load_backbone: False: the backbone is never read, and requests that need it are refused.
    """

    store: AdapterStore
    base: BaseModel
    pool: AdapterPool
    base_format: PromptFormat | None
    metrics: Metrics
    shape: ModelShape | None = None
    load_backbone: bool = True
    poll_s: float = 2.0
    verified: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._view = _View()
        self._sound: dict[
            str, int
        ] = {}  # digest of what was checked -> bytes that it takes as it serves
        self._seen: object = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Verifies the whole store, logs every problem, and begins to watch. Bad adapters do not serve; the rest do."""
        for problem in await asyncio.to_thread(self.store.verify, base=self.base, shape=self.shape):
            self._report(problem)
        await self.refresh()
        self.verified = True
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Ends the watching."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def refresh(self) -> None:
        """Reads the store if it changed; new versions are checked first, and loaded if they replace a resident one."""
        seen = await asyncio.to_thread(self._fingerprint)
        if seen == self._seen:
            return
        try:
            view = await asyncio.to_thread(self._read)
        except StoreError as error:  # channels.json is damaged: what served goes on
            self._report(error)
            view = self._view
        for entry in (*view.sound(), *view.backbones.values()):
            if isinstance(entry, TaskEntry | BackboneEntry):
                self.pool.register(
                    entry.digest, partial(entry.load, self.shape), self._sound[entry.digest]
                )
        await self._preload(view)
        self._view, self._seen = view, seen
        self.metrics.set_backbone(self.backbone)

    def resolve(
        self, task: str | None, crma: bool | None, crma_version: str | None = None
    ) -> Resolved:
        """The adapters of a request.

        Args:
            task: `name` or `name@version`; None = no task adapter.
            crma: None = on exactly if the task adapter records the backbone it was trained on.
            crma_version: of the backbone, where it is on; None = the one that serves.

        Raises:
            NotFound: no such task, version or backbone; `allowed` lists what there is.
            NoBackbone: CRMA is on, and no backbone is loaded.
            BaseMismatch, LineageMismatch: the adapters are not for this base, or not for each other.
            StoreError: what was found when the adapter was verified.
        """
        entry = None if task is None else self.task(task)
        on = crma if crma is not None else entry is not None and entry.manifest.backbone is not None
        backbone = self._backbone(crma, entry, crma_version) if on else None
        self.store.check_selection(entry, backbone, self.base.digest)
        selection = AdapterSelection(
            entry.digest if entry else None, backbone.digest if backbone else None
        )
        prompt_format = (entry.prompt_format if entry else None) or self.base_format
        return Resolved(entry, selection, prompt_format)

    def task(self, task: str) -> TaskEntry:
        """The entry of `name` or `name@version`. Raises NotFound, or what was found when it was verified."""
        name, at, version = task.partition("@")
        versions = self._view.tasks.get(name)
        if versions is None:
            hint = "; leave task out for the base model" if name == "base" else ""
            allowed = sorted(self._view.tasks)
            raise NotFound(
                f"no task {name!r} in this server's store{hint}",
                field="task",
                value=task,
                allowed=allowed,
            )
        entry = versions.get(version if at else self._view.serving[name])
        if entry is None:
            allowed = [f"{name}@{known}" for known in versions]
            raise NotFound(
                f"no version {version!r} of task {name!r}",
                field="task",
                value=task,
                allowed=allowed,
            )
        return _sound(entry)

    @property
    def backbone(self) -> BackboneEntry | None:
        """The backbone that serves; None if none does, or not a sound one."""
        return self._view.backbone if isinstance(self._view.backbone, BackboneEntry) else None

    def serving_tasks(self) -> list[TaskEntry]:
        """The serving version of every sound task, by name."""
        return [entry for entry in self._view.served().values() if isinstance(entry, TaskEntry)]

    def names(self) -> dict[str, str]:
        """Digest -> name of every sound version."""
        return {entry.digest: entry.name for entry in self._view.sound()}

    async def _preload(self, view: _View) -> None:
        """Loads what will serve in place of something resident, so that no request has to wait for it."""
        before, resident = self._view.served(), self.pool.resident()
        for name, entry in view.served().items():
            if name in before and before[name].digest in resident and entry.digest not in resident:
                try:
                    await asyncio.to_thread(self.pool.load, entry.digest)
                except Exception as error:
                    log.warning(
                        "%s is not loaded before it serves: %s", entry.manifest.place, error
                    )

    def _backbone(
        self, asked: bool | None, entry: TaskEntry | None, version: str | None
    ) -> BackboneEntry:
        if version is not None:
            if version not in self._view.backbones:
                allowed = sorted(self._view.backbones)
                raise NotFound(
                    f"no backbone {version!r} here", field="crma", value=version, allowed=allowed
                )
            return _sound(self._view.backbones[version])
        if self._view.backbone is None:
            trained = (
                f"task {entry.name!r} was trained with CRMA, and "
                if asked is None and entry
                else ""
            )
            message = f"{trained}no CRMA backbone is loaded here; send crma: false to go without"
            raise NoBackbone(message, field="crma", value=asked, allowed=False)
        return _sound(self._view.backbone)

    def _read(self) -> _View:
        channels = self.store.channels()
        tasks: dict[str, dict[str, TaskEntry | StoreError]] = {}
        for name, serving in channels.tasks.items():
            versions = dict.fromkeys((*self.store.task_versions(name), serving))
            tasks[name] = {
                version: self._checked(partial(self.store.task, name, version))
                for version in versions
            }
        there = (*self.store.backbone_versions(), channels.backbone) if self.load_backbone else ()
        read = {
            version: partial(read_backbone, self.store.root, version)
            for version in there
            if version
        }
        backbones = {version: self._checked(each) for version, each in read.items()}
        return _View(tasks, dict(channels.tasks), backbones, channels.backbone)

    def _checked(self, read: Callable[[], Entry]) -> Entry | StoreError:
        """The entry, its weights read and checked once in this process; or what is wrong with it."""
        try:
            entry = read()
            entry.check_base(self.base.digest)
            if entry.digest not in self._sound:
                size = sum(tensor.numel() for tensor in entry.load(self.shape).parameters())
                self._sound[entry.digest] = size * self.pool.injection.model.dtype.itemsize
        except StoreError as error:
            if self.verified:  # at the start, `verify` has said so
                self._report(error)
            return error
        return entry

    def _report(self, problem: StoreError) -> None:
        log.error("adapter store: %s", problem.message)
        self.metrics.verification_failures.inc()

    def _fingerprint(self) -> object:
        """Changes when channels.json is replaced or a version appears or goes."""
        root = self.store.root
        try:
            stat = (root / "channels.json").stat()
        except FileNotFoundError:
            return None
        versions = sorted(
            str(path) for pattern in ("tasks/*/v*", "backbones/v*") for path in root.glob(pattern)
        )
        return stat.st_mtime_ns, stat.st_ino, stat.st_size, versions

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.poll_s)
            try:
                await self.refresh()
            except Exception:
                log.exception("adapter store: could not be looked at; what served goes on")


def _sound(entry: Entry | StoreError) -> Entry:
    """The entry; or its problem, raised as a copy: one instance raised again and again would gather tracebacks."""
    if isinstance(entry, StoreError):
        raise copy.copy(entry)
    return entry
