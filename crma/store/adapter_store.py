"""The adapter store: versions that are published once and never change, and channels that say which of them serve.

Layout, schema and rules: `adapters_store/README.md`. Every writer holds one lock; readers need none, because a version
appears whole (`files.publish_folder`) and `channels.json` is replaced whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, Unpack

import safetensors.torch
import torch
from torch import Tensor

from crma.core.digests import files_digest
from crma.core.errors import InvalidAdapter, LineageMismatch, NotFound, StoreError
from crma.core.files import about, invalid, locked, names_in, publish_folder, to_json
from crma.method.backbone import Backbone
from crma.method.certificate import certify
from crma.method.lora import Lora
from crma.models.base_model import BaseModel
from crma.models.prompts import PromptFormat
from crma.store.channels import (
    BACKBONE,
    Channels,
    channel_folder,
    now,
    read_channels,
    task_channel,
    write_channels,
)
from crma.store.entry import (
    BackboneEntry,
    Shapes,
    TaskEntry,
    read_backbone,
    read_entry,
    read_task,
    read_weights,
    versions_in,
)
from crma.store.manifest import (
    BackboneManifest,
    Blend,
    TaskManifest,
    TrainedOn,
    add_manifest,
    check_version,
)
from crma.store.peft_format import check_fits, lora_from_peft, lora_to_peft


class Origin(TypedDict):
    """Where a version comes from. `trained_on` is None if unknown; `measured` is any JSON of finite numbers; `licence`
    SPDX where there is one."""

    base: BaseModel
    trained_on: TrainedOn | None
    measured: Mapping[str, Any]
    licence: str


class AdapterStore:
    """A folder of task adapters and backbones. Cheap to make; nothing is cached, so another process's changes show.

    Args:
        root: may be missing; it is created by the first publish.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    # Reading -----------------------------------------------------------------------------------------------------

    def channels(self) -> Channels:
        """What serves now, and its history. Raises InvalidAdapter if `channels.json` is damaged."""
        return read_channels(self.root)

    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks that serve, sorted."""
        return tuple(sorted(self.channels().tasks))

    def task_versions(self, name: str) -> tuple[str, ...]:
        """Every published version of a task, oldest first, serving or not. Raises InvalidAdapter if it is no name."""
        return versions_in(self.root, task_channel(name))

    def backbone_versions(self) -> tuple[str, ...]:
        """Every published version of the backbone, oldest first, serving or not."""
        return versions_in(self.root, BACKBONE)

    def task(self, name: str, version: str | None = None) -> TaskEntry:
        """A task's entry; without `version`, of the one that serves.

        Raises:
            NotFound: no such task or version, or none that serves.
            InvalidAdapter, DigestMismatch: its manifest is damaged, or the name is none.
        """
        serving = self.channels().version(task_channel(name)) if version is None else version
        if serving is None:
            raise NotFound(
                f"No task {name!r} serves.",
                field="task",
                value=name,
                allowed=list(self.task_names()),
            )
        return read_task(self.root, name, serving)

    def backbone(self, version: str | None = None) -> BackboneEntry | None:
        """A backbone's entry; without `version`, of the one that serves, or None if none does. Raises as `task`."""
        serving = self.channels().backbone if version is None else version
        return None if serving is None else read_backbone(self.root, serving)

    def check_selection(
        self, task: TaskEntry | None, backbone: BackboneEntry | None, base_digest: str
    ) -> None:
        """A LoRA serves on its own base only, and under CRMA only if it was trained on this backbone or an ancestor.

        Raises:
            BaseMismatch: the task adapter or the backbone was made for another base model.
            LineageMismatch: the LoRA's recorded backbone (or that it has none) does not fit `backbone`.
        """
        for entry in (task, backbone):
            if entry is not None:
                entry.check_base(base_digest)
        if task is not None and backbone is not None:
            trained_on = task.manifest.backbone
            if trained_on is None or not backbone.descends_from(trained_on):
                descent = [backbone.digest, *backbone.manifest.lineage]
                message = f"{task.name}@{task.version} was not trained under this backbone: use it with CRMA off."
                raise LineageMismatch(message, field="crma", value=trained_on, allowed=descent)

    def newcomers(self, candidate: BackboneEntry) -> list[TaskEntry]:
        """Of each task, the newest version that was trained on the way from the serving backbone to `candidate`."""
        serving = [backbone] if (backbone := self.backbone()) else []
        found = []
        for name in sorted(names_in(self.root, "tasks")):
            entries = (self.task(name, version) for version in reversed(self.task_versions(name)))
            new = (
                entry for entry in entries if _fits(entry, candidate) and not _fits(entry, *serving)
            )
            found += list(islice(new, 1))
        return found

    # Publishing --------------------------------------------------------------------------------------------------

    def publish_task(
        self,
        name: str,
        lora: Lora,
        *,
        backbone: str | None,
        prompt_format: PromptFormat | None,
        serve: bool = True,
        dtype: torch.dtype | None = torch.bfloat16,
        **origin: Unpack[Origin],
    ) -> TaskEntry:
        """Publishes a LoRA as the next version of a task, and serves it.

        `backbone` is the digest of the CRMA backbone it was trained on, None if it never saw one. `prompt_format` is
        None if unknown. `dtype` is that of the stored tensors; None keeps each as it is.

        Raises:
            LineageMismatch: `backbone` is of another base, or neither in the store nor an ancestor.
            InvalidAdapter: the name, the weights or a field of the manifest; nothing is published then.
        """
        base = origin["base"]
        config, tensors = lora_to_peft(lora, base_name=base.name, dtype=dtype)
        stored = lora_from_peft(config, tensors).config  # what is published can be loaded
        if backbone is not None:
            known = [
                entry
                for entry in self._backbones().values()
                if entry.manifest.base.digest == base.digest
            ]
            if not any(entry.descends_from(backbone) for entry in known):
                message = "The store holds neither this backbone nor a descendant for this base: publish it first."
                raise LineageMismatch(
                    message, field="backbone", value=backbone, allowed=[e.digest for e in known]
                )
        fields = {
            "name": name,
            "prompt_format": prompt_format,
            "backbone": backbone,
            "scaling": stored.scaling,
        }
        files = _files(TaskManifest.FILES, config, tensors)
        version = self._publish(
            task_channel(name), files, fields | asdict(stored), origin, serve=serve
        )
        return read_task(self.root, name, version)

    def publish_backbone(
        self,
        backbone: Backbone,
        *,
        lineage: Sequence[str],
        blend: Blend | None = None,
        serve: bool = True,
        **origin: Unpack[Origin],
    ) -> BackboneEntry:
        """Publishes a backbone, its raw fp32 parameters and its certificate; else as `publish_task`.

        `lineage` is the digests of all its ancestors, nearest first (the movement from the nearest is certified, if the
        store has it); `blend` names the two backbones it lies between, if it was not trained.

        Raises:
            BaseMismatch: an ancestor was made for another base model.
            LineageMismatch: an ancestor's own ancestors are not in `lineage`: their LoRAs would stop serving.
        """
        Backbone.from_tensors(
            backbone.config, backbone.tensors()
        )  # what is published can be loaded
        known = self._backbones()
        for ancestor in (known[digest] for digest in lineage if digest in known):
            ancestor.check_base(origin["base"].digest)
            if forgotten := [
                digest for digest in ancestor.manifest.lineage if digest not in lineage
            ]:
                message = f"The lineage leaves out ancestors of {ancestor.version}: their LoRAs would stop serving."
                raise LineageMismatch(
                    message, field="lineage", value=list(lineage), allowed=f"with {forgotten}"
                )
        parent = known[lineage[0]].load() if lineage and lineage[0] in known else None
        certificate = certify(backbone, parent)
        fields = {
            "config": backbone.config,
            "lineage": lineage,
            "blend": blend,
            "certificate": certificate,
        }
        version = self._publish(BACKBONE, _backbone_files(backbone), fields, origin, serve=serve)
        return read_backbone(self.root, version)

    def import_peft(
        self,
        path: Path,
        name: str,
        base: BaseModel,
        *,
        licence: str = "unknown",
        shapes: Shapes | None = None,
    ) -> TaskEntry:
        """Publishes a PEFT LoRA from a local folder, its tensors in their own dtype, with no CRMA lineage.

        Only `adapter_config.json` and `adapter_model.safetensors` are opened. Links are followed (the Hub's cache is
        made of them): `path` is the operator's word, never a request's.

        Raises:
            InvalidAdapter: as `peft_format.lora_from_peft`, and with `shapes`, as `check_fits`.
        """
        with about(str(path)):
            config, tensors = read_weights([(path / file).resolve() for file in TaskManifest.FILES])
            lora = lora_from_peft(config, tensors)
            if shapes is not None:
                check_fits(config, lora, shapes)
        origin: Origin = {"base": base, "trained_on": None, "measured": {}, "licence": licence}
        return self.publish_task(
            name, lora, backbone=None, prompt_format=None, dtype=None, **origin
        )

    # Serving -----------------------------------------------------------------------------------------------------

    def set_serving(
        self,
        moves: Mapping[str, str | None],
        *,
        evidence: Mapping[str, Any] | None = None,
        since: Channels | None = None,
    ) -> Channels:
        """Moves channels, `backbone` or `tasks/<name>`, to published versions (None: nothing serves): all, or none.

        Args:
            evidence: recorded with the first change. If `moves` is empty, it is recorded that the backbone was kept.
            since: what the decision was based on; if something else serves by now, nothing moves.

        Raises:
            NotFound: no such version.
            InvalidAdapter: no such channel, a damaged manifest, or evidence that is not finite JSON.
            StoreError: something else serves than `since`.
        """
        with locked(self.root):
            channels = read_channels(self.root)
            if since is not None and channels.serving() != since.serving():
                message = "Something else serves since this was decided: decide again."
                raise StoreError(
                    message, field="channels", value=channels.serving(), allowed=since.serving()
                )
            if not moves and evidence is not None:
                channels = channels.keep(BACKBONE, evidence)
            for channel, version in moves.items():
                channels, evidence = channels.serve(channel, version, evidence), None
            return self._write(moves, channels)

    def roll_back(self, channel: str, *, evidence: Mapping[str, Any] | None = None) -> Channels:
        """Moves a channel to what served before; with the backbone, tasks go back until their lineage fits it again.

        Raises NotFound if nothing served before, or no backbone did; else as `set_serving`.
        """
        with locked(self.root):
            before = read_channels(self.root)
            channels = before.roll_back(channel, evidence)
            if channel == BACKBONE and channels.backbone is None:
                # Every task that was trained on a backbone would be refused from then on.
                message = f"No backbone served before {before.backbone}: there is nothing to roll back to."
                raise NotFound(
                    message, field="channel", value=channel, allowed="a backbone that was replaced"
                )
            moved = [channel]
            backbones = [read_backbone(self.root, channels.backbone)] if channels.backbone else []
            for name in channels.tasks if channel == BACKBONE and backbones else ():
                while (version := channels.tasks.get(name)) and not _fits(
                    self.task(name, version), *backbones
                ):
                    channels = channels.roll_back(task_channel(name), evidence)
                    moved.append(task_channel(name))
            return self._write(moved, channels)

    # Checking ----------------------------------------------------------------------------------------------------

    def verify(
        self, *, base: BaseModel | None = None, shapes: Shapes | None = None
    ) -> list[StoreError]:
        """Every problem of the whole store; empty if there is none. Raises nothing for what the store holds.

        Args:
            base: the model that is served; every entry must be made for it.
            shapes: of that model; every entry must fit it.
        """
        entries, channels, problems = self._structure()
        for entry in entries:
            with _collected(problems):
                if (
                    base is not None
                ):  # first: what is made for another base rarely fits this one's shapes either
                    entry.check_base(base.digest)
                weights = entry.load(shapes)
                if isinstance(entry, BackboneEntry) and isinstance(weights, Backbone):
                    entry.check_certificate(certify(weights))
        backbones = [entry for entry in entries if isinstance(entry, BackboneEntry)]
        serving = [entry for entry in backbones if entry.version == channels.backbone]
        for task in (entry for entry in entries if isinstance(entry, TaskEntry)):
            # A task trained on a backbone needs the serving one if both serve, any in the store otherwise.
            serves = channels.tasks.get(task.name) == task.version
            candidates = serving if serves and serving else backbones
            if not _fits(task, *candidates):
                message = f"{task.manifest.place}: no backbone to serve under is its own or descends from it."
                value, allowed = (
                    task.manifest.backbone,
                    [backbone.digest for backbone in candidates],
                )
                problems.append(
                    LineageMismatch(message, field="backbone", value=value, allowed=allowed)
                )
        return problems

    def _structure(self) -> tuple[list[TaskEntry | BackboneEntry], Channels, list[StoreError]]:
        """The entries with a sound folder and manifest, what serves, and what is wrong with the rest."""
        entries: list[TaskEntry | BackboneEntry] = []
        problems: list[StoreError] = []
        channels = Channels()
        tasks = _names(problems, task_channel, self.root, "tasks")
        for channel in (BACKBONE, *map(task_channel, tasks)):
            for version in _names(problems, check_version, self.root, channel_folder(channel)):
                with _collected(problems):
                    entries.append(read_entry(self.root, channel, version))
        with _collected(problems):
            channels = read_channels(self.root)
            channels.check_integrity()
            published = {entry.manifest.place for entry in entries}
            for channel, version in channels.serving().items():
                if f"{channel_folder(channel)}/{version}" not in published:
                    message = f"{channel}: serves {version}, which is not in the store, or damaged."
                    problems.append(
                        NotFound(
                            message, field=channel, value=version, allowed="a published version"
                        )
                    )
        return entries, channels, problems

    # -------------------------------------------------------------------------------------------------------------

    def _backbones(self) -> dict[str, BackboneEntry]:
        """By digest."""
        entries = (read_backbone(self.root, version) for version in self.backbone_versions())
        return {entry.digest: entry for entry in entries}

    def _publish(
        self,
        channel: str,
        files: Mapping[str, bytes],
        fields: Mapping[str, Any],
        origin: Origin,
        *,
        serve: bool,
    ) -> str:
        """Writes the next version, and moves its channel to it; returns the version."""
        kind = BackboneManifest if channel == BACKBONE else TaskManifest
        base = {"name": origin["base"].name, "digest": origin["base"].digest}
        with locked(self.root):
            taken = versions_in(self.root, channel)
            version = f"v{int(taken[-1][1:]) + 1 if taken else 1}"
            made = {**origin, **fields, "base": base, "version": version, "created": now()}
            files = add_manifest(kind, files, **made)
            publish_folder(self.root, self.root / channel_folder(channel) / version, files)
            if serve:
                write_channels(self.root, read_channels(self.root).serve(channel, version))
        return version

    def _write(self, moved: Iterable[str], channels: Channels) -> Channels:
        """Makes changes count, once what they name is known to be there. Call with the lock held."""
        for channel in moved:
            if (version := channels.version(channel)) is not None:
                read_entry(self.root, channel, version)
        write_channels(self.root, channels)
        return channels


def _fits(task: TaskEntry, *backbones: BackboneEntry) -> bool:
    """Whether it has no lineage to keep (then it serves without CRMA), or may serve under one of these."""
    trained_on = task.manifest.backbone
    return trained_on is None or any(backbone.descends_from(trained_on) for backbone in backbones)


def backbone_digest(backbone: Backbone) -> str:
    """The digest that a backbone is published under."""
    return files_digest(_backbone_files(backbone))


def _files(
    names: tuple[str, str], config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> dict[str, bytes]:
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    return dict(zip(names, (to_json(config), weights), strict=True))


def _backbone_files(backbone: Backbone) -> dict[str, bytes]:
    return _files(BackboneManifest.FILES, backbone.config.to_dict(), backbone.tensors())


def _names(
    problems: list[StoreError], check: Callable[[str], str], root: Path, place: str
) -> list[str]:
    """Names in a folder that pass `check`, sorted; the others, and a folder that is a link, are problems."""
    names: list[str] = []
    with _collected(problems):
        for name in sorted(names_in(root, place)):
            try:
                check(name)
                names.append(name)
            except InvalidAdapter as error:
                problems.append(
                    invalid("does not belong here.", f"{place}/{name}", name, error.allowed)
                )
    return names


@contextmanager
def _collected(problems: list[StoreError]) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        problems.append(error)
