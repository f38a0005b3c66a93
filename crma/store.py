"""The adapter store: versions that are published once and never change, and channels that say which of them serve.

Layout, schema and rules: `adapters_store/README.md`. Every writer holds one lock; readers need none, because a version
appears whole (`files.publish_folder`) and `channels.json` is replaced whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from crma.adapter import Backbone
from crma.certificate import certify
from crma.channels import BACKBONE, Channels, channel_task, now, read_channels, task_channel, write_channels
from crma.entry import (
    BackboneEntry,
    Shapes,
    TaskEntry,
    about,
    backbone_from_files,
    read_backbone,
    read_config,
    read_task,
    read_tensors,
    versions_in,
)
from crma.errors import AlreadyExists, BaseMismatch, LineageMismatch, NotFound, StoreError
from crma.files import locked, publish_folder, remove_leftovers, to_json
from crma.integrity import content_problems, structural_problems
from crma.lora import Lora
from crma.manifest import (
    BACKBONE_FILES,
    MANIFEST,
    TASK_FILES,
    BackboneManifest,
    Blend,
    TaskManifest,
    TrainedOn,
    bytes_digest,
    check_name,
    check_version,
    content_digest,
    make_manifest,
)
from crma.peft_format import check_fits, lora_from_peft, lora_to_peft
from crma.prompts import PromptFormat

if TYPE_CHECKING:
    from crma.pull import BaseModel

__all__ = ["AdapterStore", "BackboneEntry", "TaskEntry", "backbone_digest"]


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
        return versions_in(self.root, "tasks", check_name(name))

    def backbone_versions(self) -> tuple[str, ...]:
        """Every published version of the backbone, oldest first, serving or not."""
        return versions_in(self.root, "backbones")

    def task(self, name: str, version: str | None = None) -> TaskEntry:
        """A task's entry; without `version`, of the one that serves.

        Raises:
            NotFound: no such task or version, or none that serves.
            InvalidAdapter, DigestMismatch: its manifest is damaged, or the name is none.
        """
        serving = self.channels().version(task_channel(name)) if version is None else check_version(version)
        if serving is None:
            raise NotFound(f"No task {name!r} serves.", field="task", value=name, allowed=list(self.task_names()))
        return read_task(self.root, name, serving)

    def backbone(self, version: str | None = None) -> BackboneEntry | None:
        """A backbone's entry; without `version`, of the one that serves, or None if none does. Raises as `task`."""
        serving = self.channels().backbone if version is None else check_version(version)
        return None if serving is None else read_backbone(self.root, serving)

    def check_selection(self, task: TaskEntry | None, backbone: BackboneEntry | None, base_digest: str) -> None:
        """A LoRA serves on its own base only, and under CRMA only if it was trained on this backbone or an ancestor.

        Raises:
            BaseMismatch: the task adapter or the backbone was made for another base model.
            LineageMismatch: the LoRA's recorded backbone (or that it has none) does not fit `backbone`.
        """
        for entry in (task, backbone):
            if entry is not None:
                _check_base(entry, base_digest)
        if task is not None and backbone is not None:
            trained_on = task.manifest.backbone
            if trained_on is None or not backbone.descends_from(trained_on):
                raise LineageMismatch(
                    f"{task.name}@{task.version} was not trained on backbone {backbone.version} or an ancestor of it; "
                    "use it with CRMA off.",
                    field="crma",
                    value=trained_on,
                    allowed=[backbone.digest, *backbone.manifest.lineage],
                )

    # Publishing --------------------------------------------------------------------------------------------------

    def publish_task(
        self,
        name: str,
        lora: Lora,
        *,
        base: BaseModel,
        backbone: str | None,
        prompt_format: PromptFormat | None,
        trained_on: TrainedOn | None,
        measured: Mapping[str, Any],
        licence: str,
        version: str | None = None,
        serve: bool = True,
        dtype: torch.dtype | None = torch.bfloat16,
    ) -> TaskEntry:
        """Publishes a LoRA as the next version of a task, or as `version`, and serves it.

        `backbone` is the digest of the CRMA backbone it was trained on, None if it never saw one. `prompt_format` and
        `trained_on` are None if unknown; `measured` is any JSON of finite numbers; `licence` SPDX where there is one.
        `dtype` is that of the stored tensors; None keeps each as it is.

        Raises:
            AlreadyExists: the version is published.
            BaseMismatch, LineageMismatch: `backbone` is of another base, or neither in the store nor an ancestor.
            InvalidAdapter: the name, the weights or a field of the manifest; nothing is published then.
        """
        channel = task_channel(name)
        config, tensors = lora_to_peft(lora, base_name=base.name, dtype=dtype)
        stored = lora_from_peft(config, tensors).config  # what is published can be loaded
        if backbone is not None:
            self._check_backbone_known(backbone, base.digest)
        fields = {
            "kind": "task",
            "name": name,
            "base": {"name": base.name, "digest": base.digest},
            "prompt_format": None if prompt_format is None else prompt_format.to_dict(),
            "rank": stored.rank,
            "alpha": stored.alpha,
            "scaling": stored.scaling,
            "target_modules": stored.target_modules,
            "backbone": backbone,
            **_provenance(trained_on, measured, licence),
        }
        files = dict(zip(TASK_FILES, (to_json(config), _save(tensors)), strict=True))
        return read_task(self.root, name, self._publish(TaskManifest, channel, files, fields, version, serve))

    def publish_backbone(
        self,
        backbone: Backbone,
        *,
        base: BaseModel,
        lineage: Sequence[str],
        trained_on: TrainedOn | None,
        measured: Mapping[str, Any],
        licence: str,
        blend: Blend | None = None,
        version: str | None = None,
        serve: bool = True,
    ) -> BackboneEntry:
        """Publishes a backbone, its raw fp32 parameters and its certificate; else as `publish_task`.

        `lineage` is the digests of all its ancestors, nearest first (the movement from the nearest is certified, if the
        store has it); `blend` names the two backbones it lies between, if it was not trained.

        Raises:
            LineageMismatch: an ancestor's own ancestors are not in `lineage`: their LoRAs would stop serving.
        """
        files = _backbone_files(backbone)
        backbone_from_files(backbone.config.to_dict(), backbone.tensors())  # what is published can be loaded
        known = self._backbones_by_digest()
        _check_lineage(lineage, known, base.digest)
        parent = known[lineage[0]].load() if lineage and lineage[0] in known else None
        fields = {
            "kind": "backbone",
            "base": {"name": base.name, "digest": base.digest},
            "config": backbone.config.to_dict(),
            "lineage": list(lineage),
            "blend": None if blend is None else blend.model_dump(mode="json", by_alias=True),
            "certificate": certify(backbone, parent),
            **_provenance(trained_on, measured, licence),
        }
        return read_backbone(self.root, self._publish(BackboneManifest, BACKBONE, files, fields, version, serve))

    def import_peft(
        self,
        path: Path,
        name: str,
        base: BaseModel,
        *,
        prompt_format: PromptFormat | None = None,
        licence: str = "unknown",
        measured: Mapping[str, Any] | None = None,
        shapes: Shapes | None = None,
        version: str | None = None,
        serve: bool = True,
    ) -> TaskEntry:
        """Publishes a PEFT LoRA from a local folder, its tensors in their own dtype, with no CRMA lineage.

        Only `adapter_config.json` and `adapter_model.safetensors` are opened. Links are followed (the Hub's cache is
        made of them): `path` is the operator's word, never a request's.

        Raises:
            InvalidAdapter: as `peft_format.lora_from_peft`, and with `shapes`, as `check_fits`.
        """
        config_file, weights_file = ((path / name).resolve() for name in TASK_FILES)
        with about(str(path)):
            config = read_config(config_file)
            lora = lora_from_peft(config, read_tensors(weights_file))
            if shapes is not None:
                check_fits(config, lora, shapes)
        return self.publish_task(
            name,
            lora,
            base=base,
            backbone=None,
            prompt_format=prompt_format,
            trained_on=None,
            measured=measured or {},
            licence=licence,
            version=version,
            serve=serve,
            dtype=None,
        )

    def clean(self) -> tuple[str, ...]:
        """Deletes what killed publishers left behind, and returns the names."""
        with locked(self.root):
            return remove_leftovers(self.root)

    # Serving -----------------------------------------------------------------------------------------------------

    def set_serving(self, channel: str, version: str | None, *, evidence: Mapping[str, Any] | None = None) -> Channels:
        """Moves a channel, `backbone` or `tasks/<name>`, to a published version (None: nothing serves).

        Raises:
            NotFound: no such version.
            InvalidAdapter: no such channel, a damaged manifest, or evidence that is not finite JSON.
        """
        with locked(self.root):
            return self._write(channel, read_channels(self.root).serve(channel, version, evidence))

    def roll_back(self, channel: str, *, evidence: Mapping[str, Any] | None = None) -> Channels:
        """Moves a channel to what served before. Raises NotFound if nothing did, else as `set_serving`."""
        with locked(self.root):
            return self._write(channel, read_channels(self.root).roll_back(channel, evidence))

    # Checking ----------------------------------------------------------------------------------------------------

    def verify(self, *, base: BaseModel | None = None, shapes: Shapes | None = None) -> list[StoreError]:
        """Every problem of the whole store; empty if there is none. Raises nothing for what the store holds.

        Args:
            base: the model that is served; every entry must be made for it.
            shapes: of that model; every entry must fit it.
        """
        problems = structural_problems(self.root)
        return problems + content_problems(self.root, None if base is None else base.digest, shapes)

    def check_integrity(self) -> None:
        """Raises the first thing wrong with the store's structure: folders, listings, channels. Reads no weights."""
        for problem in structural_problems(self.root):
            raise problem

    # -------------------------------------------------------------------------------------------------------------

    def _backbones_by_digest(self) -> dict[str, BackboneEntry]:
        entries = (read_backbone(self.root, version) for version in self.backbone_versions())
        return {entry.digest: entry for entry in entries}

    def _check_backbone_known(self, digest: str, base_digest: str) -> None:
        for entry in self._backbones_by_digest().values():
            if entry.descends_from(digest):
                return _check_base(entry, base_digest)
        raise LineageMismatch(
            "The store holds neither this backbone nor one that descends from it; publish the backbone first.",
            field="backbone",
            value=digest,
            allowed=sorted(self._backbones_by_digest()),
        )

    def _publish(
        self,
        kind: type[TaskManifest] | type[BackboneManifest],
        channel: str,
        files: Mapping[str, bytes],
        fields: Mapping[str, Any],
        version: str | None,
        serve: bool,
    ) -> str:
        """Writes one version, and moves its channel to it; returns the version."""
        parts = ("backbones",) if channel == BACKBONE else tuple(channel.split("/"))
        with locked(self.root):
            taken = versions_in(self.root, *parts)
            version = f"v{int(taken[-1][1:]) + 1 if taken else 1}" if version is None else check_version(version)
            if version in taken:
                where = "/".join((*parts, version))
                raise AlreadyExists(f"{where} is published.", field="version", value=version, allowed="a new version")
            digests = {name: bytes_digest(data) for name, data in files.items()}
            manifest = make_manifest(kind, {**fields, "version": version, "files": digests, "created": now()})
            target = self.root.joinpath(*parts, version)
            publish_folder(self.root, target, {**files, MANIFEST: to_json(manifest.to_dict())})
            if serve:
                write_channels(self.root, read_channels(self.root).serve(channel, version))
        return version

    def _write(self, channel: str, channels: Channels) -> Channels:
        """Makes a change count, once what it names is known to be there. Call with the lock held."""
        version = channels.version(channel)
        if version is not None:
            check_version(version)
            if channel == BACKBONE:
                read_backbone(self.root, version)
            else:
                read_task(self.root, channel_task(channel), version)
        write_channels(self.root, channels)
        return channels


def backbone_digest(backbone: Backbone) -> str:
    """The digest a backbone would be published under: for lineages of backbones that are never published."""
    return content_digest({name: bytes_digest(data) for name, data in _backbone_files(backbone).items()})


def _backbone_files(backbone: Backbone) -> dict[str, bytes]:
    return dict(zip(BACKBONE_FILES, (to_json(backbone.config.to_dict()), _save(backbone.tensors())), strict=True))


def _save(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _provenance(trained_on: TrainedOn | None, measured: Mapping[str, Any], licence: str) -> dict[str, Any]:
    record = None if trained_on is None else trained_on.model_dump(mode="json")
    return {"trained_on": record, "measured": dict(measured), "licence": licence}


def _check_base(entry: TaskEntry | BackboneEntry, base_digest: str) -> None:
    made_for = entry.manifest.base
    if made_for.digest != base_digest:
        raise BaseMismatch(
            f"Made for another base model, {made_for.name}.", field="base", value=made_for.digest, allowed=base_digest
        )


def _check_lineage(lineage: Sequence[str], known: Mapping[str, BackboneEntry], base_digest: str) -> None:
    """Ancestors are of the same base, and their own ancestors are in `lineage` too."""
    for ancestor in (known[digest] for digest in lineage if digest in known):
        _check_base(ancestor, base_digest)
        if forgotten := [digest for digest in ancestor.manifest.lineage if digest not in lineage]:
            raise LineageMismatch(
                f"The lineage leaves out ancestors of backbone {ancestor.version}: their LoRAs would stop serving.",
                field="lineage",
                value=list(lineage),
                allowed=f"with {forgotten}",
            )
