"""Task names to digests: the adapters of a request, whether they may serve, and a store kept fresh.

A request never touches the file system: its names are looked up in a view of the store that was
read before. A view is replaced whole, so a request sees all of a publication or none of it. Before
a view is replaced, new versions of resident adapters are loaded. Running requests keep the digests
that they started with.
"""

import asyncio
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from crma.core.errors import ConfigError, CrmaError, LineageMismatch, NotFound, StoreError
from crma.core.selection import AdapterSelection
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.models.prompts import Format
from crma.store.adapter_store import AdapterStore
from crma.store.channels import Change
from crma.store.entry import BackboneEntry, TaskEntry
from crma.store.incoming import remove_leftovers
from crma.store.serving import check_selection
from server.daemon_threads import DaemonThreads
from server.engine.inference_engine import InferenceEngine
from server.service.caller import ANYONE, Caller
from server.service.errors import NoBackbone
from server.service.metrics import Metrics
from server.service.store_reader import StoreReader
from server.service.store_view import StoreView, VersionRecord
from server.service.store_watch import StoreProblems, follow, watch, with_patience

if TYPE_CHECKING:
    from server.engine.inference_engine import Loader

log = logging.getLogger("server")

Entry = TypeVar("Entry", TaskEntry, BackboneEntry)


@dataclass(frozen=True)
class Resolved:
    """The adapters of a request, and who uses them.

    prompt_format: None where the base model has no chat template: only raw prompts work.
    """

    task: TaskEntry | None
    selection: AdapterSelection
    prompt_format: Format | None
    caller: Caller = ANYONE


@dataclass(eq=False)
class Registry:
    """The current view of the store.

    Args:
        store: looked at every `poll_s` seconds.
        base: the model that serves.
        engine: is told how to load every adapter that may serve.
        base_format: the chat template of the base; also for adapters that recorded no format.
        shape: of the base; adapters must fit it.
        load_backbone: False: backbones are never read, and requests that need one are refused.
        patience_s: seconds after which a store that does not answer is a problem.
        copy_s: seconds between two looks at the store on another machine that `store` copies.

    Attributes:
        threads: for all work on the store.
        on_changes: is told what the store's history gained while the server runs.
    """

    store: AdapterStore
    base: BaseModel
    engine: InferenceEngine
    base_format: Format | None
    metrics: Metrics
    shape: ModelShape | None = None
    load_backbone: bool = True
    poll_s: float = 2.0
    patience_s: float = 10.0
    copy_s: float = 10.0
    verified: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.on_changes: Callable[[Sequence[Change]], None] = lambda _: None
        self._view = StoreView()
        self._problems = StoreProblems(self.metrics)
        self._reader = StoreReader(
            self.store, self.base, self.shape, self.load_backbone, self._report
        )
        self.threads = DaemonThreads()
        self._watching: list[asyncio.Task[None]] = []
        self._refreshing = asyncio.Lock()  # else an older view could replace a newer one

    async def start(self) -> None:
        """Verify the whole store, log every problem, and start to watch it.

        Damaged adapters do not serve; the rest do.
        """
        await with_patience(self._verify(), self.patience_s, self._problems)
        self.verified = True
        watching = watch(self.refresh, self.poll_s, self.patience_s, self._problems)
        self._watching.append(asyncio.create_task(watching))
        mirror = self.store.mirror
        if mirror is not None:
            self._problems.set_source(mirror.problems)
            copying = follow(partial(self.threads.run, mirror.copy), self.copy_s, self._problems)
            self._watching.append(asyncio.create_task(copying))

    async def _verify(self) -> None:
        await self.threads.run(partial(remove_leftovers, self.store.root))
        for problem in await self.threads.run(self._reader.verify):
            self._problems.report(problem)
        await self.refresh()

    def _report(self, problem: StoreError) -> None:
        if self.verified:  # before that, `start` reports the problems that `verify` found
            self._problems.report(problem)

    async def stop(self) -> None:
        """Stop watching."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self.threads.wait(self.patience_s)

    async def refresh(self) -> None:
        """Read the store if it changed. New versions are checked, and loaded where they replace a
        resident one, before the view changes."""
        async with self._refreshing:
            await self._refresh()

    def resolve(
        self,
        task: str | None,
        crma: bool | None,
        crma_version: str | None = None,
        caller: Caller = ANYONE,
    ) -> Resolved:
        """The adapters of a request.

        Args:
            task: `name` or `name@version`; None: no task adapter.
            crma: None: on exactly if the task adapter records the backbone it was trained on.
            crma_version: of the backbone, where it is on; None: the one that serves.
            caller: of the request.

        Raises:
            NotFound: no such task, version or backbone for the caller; `allowed` lists those.
            NoBackbone: CRMA is on, and no backbone is loaded.
            BaseMismatch, LineageMismatch: the adapters are made for another base, or another
                backbone.
            StoreError: the problem found when the adapter was verified.
        """
        entry = None if task is None else self.task(task, caller)
        uses_crma = crma
        if uses_crma is None:
            uses_crma = entry is not None and entry.manifest.backbone is not None
        backbone = self._backbone(crma, entry, crma_version) if uses_crma else None
        check_selection(entry, backbone, self.base.digest)
        selection = AdapterSelection(
            task_digest=entry.digest if entry else None,
            crma_digest=backbone.digest if backbone else None,
        )
        prompt_format = entry.prompt_format if entry else None
        return Resolved(entry, selection, prompt_format or self.base_format, caller)

    def task(self, task: str, caller: Caller) -> TaskEntry:
        """The entry of `name` or `name@version`.

        Raises NotFound, also where the caller may not use it, or the problem found when it was
        verified.
        """
        name, at, version = task.partition("@")
        versions = self._versions(name, task, caller)
        entry = versions.get(version if at else self._view.serving[name])
        if entry is None:
            allowed = [f"{name}@{known}" for known in versions]
            message = f"no version {version!r} of task {name!r}"
            raise NotFound(message, field="task", value=task, allowed=allowed)
        return _sound(entry)

    def format_of(self, task: str, caller: Caller) -> Format | None:
        """The prompt format of a task; of the base model for `base`, or if it recorded none.

        Raises as `task`.
        """
        if task == "base":
            return self.base_format
        try:
            return self.task(task, caller).prompt_format or self.base_format
        except NotFound as error:
            error.field = "format_of"
            raise

    def task_record(self, name: str, caller: Caller) -> VersionRecord[TaskEntry]:
        """All versions of a task that serves. Raises NotFound, also where the caller may not use
        it.
        """
        self._versions(name, name, caller)
        return self._view.task_record(name)

    def backbone_version(self, version: str, field: str = "crma") -> BackboneEntry:
        """A version of the backbone, which a field of a request names.

        Raises NotFound, or the problem found when it was verified.
        """
        known = self._view.backbones
        if version not in known:
            message = f"no backbone {version!r} here"
            raise NotFound(message, field=field, value=version, allowed=sorted(known))
        return _sound(known[version])

    def backbone_record(self) -> VersionRecord[BackboneEntry]:
        """All versions of the backbone, and which of them served."""
        return self._view.backbone_record()

    def _versions(
        self, name: str, asked: str, caller: Caller
    ) -> Mapping[str, TaskEntry | StoreError]:
        versions = self._view.tasks.get(name) if caller.may_use(name) else None
        if versions is None:
            hint = "; leave task out for the base model" if name == "base" else ""
            message = f"no task {name!r} in this server's store{hint}"
            allowed = [each for each in self.task_names if caller.may_use(each)]
            raise NotFound(message, field="task", value=asked, allowed=allowed)
        return versions

    @property
    def backbone(self) -> BackboneEntry | None:
        """The backbone that serves; None if none does, or if it is damaged."""
        backbone = self._view.backbone
        return backbone if isinstance(backbone, BackboneEntry) else None

    @property
    def store_problem(self) -> str | None:
        """Why the store cannot be read or copied now; what served before goes on serving."""
        return self._problems.shown

    @property
    def problems(self) -> dict[str, str]:
        """The tasks whose serving version cannot answer as it was trained: name -> reason.

        A backbone that the operator left out (`load_backbone`) is no such reason.
        """
        problems = self._view.problems
        if not self.load_backbone:
            problems = {
                name: problem
                for name, problem in problems.items()
                if not isinstance(problem, LineageMismatch)
            }
        return {name: problem.message for name, problem in problems.items()}

    def serving_tasks(self, caller: Caller) -> list[TaskEntry]:
        """The serving version of every sound task that exists for a caller, by name."""
        found = self._view.serving_tasks().values()
        return [entry for entry in found if caller.may_use(entry.name)]

    def names(self) -> dict[str, str]:
        """Digest to name, of every sound version."""
        return {entry.digest: entry.name for entry in self._view.sound_tasks()}

    def model_names(self) -> dict[str, str]:
        """Digest to what clients send as `model`, of every sound version.

        That is the name of its task for the version that serves, and `name@version` for others.
        """
        sound = self._view.sound_tasks()
        named = {entry.digest: f"{entry.name}@{entry.version}" for entry in sound}
        serving = self._view.serving_tasks().values()
        return named | {entry.digest: entry.name for entry in serving}

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks that serve, sound or not, sorted."""
        return sorted(self._view.tasks)

    def versions(self, name: str) -> list[TaskEntry]:
        """Every sound version of a task that serves."""
        return [entry for entry in self._view.sound_tasks() if entry.name == name]

    async def hold(self, entry: TaskEntry) -> None:
        """Keep an adapter loadable from memory whose files are about to go, for requests that have
        it already."""
        try:
            lora = await self.threads.run(partial(entry.load, self.shape))
        except StoreError:  # damaged: no request has it
            return
        self._register(entry, lambda: lora)

    def forget(self, entries: Sequence[TaskEntry], after_s: float) -> None:
        """End `hold`, after seconds in which every request that has one of them ends."""

        def forget() -> None:
            named = self.names()
            for entry in entries:
                if entry.digest not in named:  # nor published again meanwhile
                    self._register(entry, partial(entry.load, self.shape))

        asyncio.get_running_loop().call_later(after_s, forget)

    async def _refresh(self) -> None:
        if not await self.threads.run(self._reader.has_changed):
            return
        view = self._view
        problem: CrmaError | None = None
        try:
            view = await self.threads.run(self._reader.read)
        except (StoreError, ConfigError) as error:  # ConfigError: of the key that signs
            problem = error
        except OSError as error:
            message = f"cannot be read: {error.strerror}: {error.filename}"
            problem = StoreError(message, field="store", value=str(self.store.root))
        self._problems.set(problem)
        self._problems.count(view.num_refused())
        sound: list[TaskEntry | BackboneEntry] = [*view.sound_tasks(), *view.sound_backbones()]
        for entry in sound:
            self._register(entry, self._reader.suspects.loader(entry, self.shape))
        await self._preload(view)
        problems = self.problems
        changes = view.history[len(self._view.history) :]
        self._view = view
        self.metrics.serve_adapters(view.tasks)
        self.metrics.set_drift(view.drift)
        self.metrics.set_backbone(self.backbone)
        self._show_problems(problems)
        if self.verified and changes:
            self.on_changes(changes)

    def _show_problems(self, before: Mapping[str, str]) -> None:
        """Count the tasks that cannot serve, and log those that could `before`."""
        self.metrics.tasks_unable.set(len(self.problems))
        for name, message in self.problems.items():
            if self.verified and before.get(name) != message:
                log.error("task %s cannot serve: %s", name, message)

    async def _preload(self, view: StoreView) -> None:
        """Load new versions that replace a resident one, so that no request waits for them."""
        before = self._view.serving_entries()
        resident = self.engine.resident()
        for name, entry in view.serving_entries().items():
            if name not in before or before[name].digest not in resident:
                continue
            if entry.digest in resident:
                continue
            try:
                await self.engine.load(entry.digest)
            except Exception as error:
                place = entry.manifest.place
                log.warning("%s is not loaded before it serves: %s", place, error)

    def _backbone(
        self, asked: bool | None, entry: TaskEntry | None, version: str | None
    ) -> BackboneEntry:
        """The backbone of a version, or the one that serves. Raises as `resolve`."""
        if version is not None:
            return self.backbone_version(version)
        if self._view.backbone is None:
            trained = ""
            if asked is None and entry is not None:
                trained = f"task {entry.name!r} was trained with CRMA, and "
            message = f"{trained}no CRMA backbone is loaded here; send crma: false to go without"
            raise NoBackbone(message, field="crma", value=asked, allowed=False)
        return _sound(self._view.backbone)

    def _register(self, entry: TaskEntry | BackboneEntry, loader: "Loader") -> None:
        num_parameters = self._reader.num_parameters(entry.manifest.place)
        self.engine.register(entry.digest, loader, num_parameters)


def _sound(entry: Entry | StoreError) -> Entry:
    """The entry; or its problem, raised as a copy: one instance would gather tracebacks."""
    if isinstance(entry, StoreError):
        raise copy.copy(entry)
    return entry
