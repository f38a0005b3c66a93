"""Publishes versions: checks them, writes them whole, and lets them serve.

`AdapterStore` has the public methods; their docstrings state what is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from crma.core.digests import files_digest
from crma.core.errors import LineageMismatch, StoreError
from crma.core.files import locked, publish_folder, to_json
from crma.models.base_model import BaseModel
from crma.store.channels import (
    BACKBONE,
    channel_folder,
    now,
    read_channels,
    task_channel,
    write_channels,
)
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone, read_task, versions_in
from crma.store.manifest import (
    BACKBONE_FILES,
    MANIFEST,
    TASK_FILES,
    BackboneManifest,
    Blend,
    TaskManifest,
    TrainedOn,
    add_manifest,
    parse_record,
)
from crma.store.peft_format import StoredLora, lora_from_peft, lora_to_peft
from crma.store.serving import Entry, check_change
from crma.store.stored_tensor import StoredTensor, write_tensors

if TYPE_CHECKING:
    from crma.method.backbone import Backbone


class Origin(TypedDict):
    """Where a version comes from.

    `trained_on` is None if unknown, `measured` is any JSON of finite numbers, and `licence` is an
    SPDX identifier where there is one.
    """

    base: BaseModel
    trained_on: TrainedOn | None
    measured: Mapping[str, Any]
    licence: str


def publish_lora(
    root: Path, name: str, lora: StoredLora, fields: Mapping[str, Any], origin: Origin, serve: bool
) -> TaskEntry:
    """Publishes a task adapter in PEFT's files.

    Args:
        root: of the store.
        name: of the task.
        lora: the weights.
        fields: `backbone` and `prompt_format` of the manifest.
        origin: the manifest's fields that every version has.
        serve: whether the version serves from now on.

    Raises:
        LineageMismatch, InvalidAdapter: as `AdapterStore.publish_task`.
    """
    base = origin["base"]
    config, tensors = lora_to_peft(lora, base_name=base.name)
    stored = lora_from_peft(config, tensors)  # proves that the files can be loaded
    if fields["backbone"] is not None:
        _check_trained_on(root, fields["backbone"], base)
    described = {
        "name": name,
        "rank": stored.rank,
        "alpha": stored.alpha,
        "scaling": stored.scaling,
        "target_modules": stored.target_modules,
    }
    files = _files(TASK_FILES, config, tensors)
    version = _publish(root, task_channel(name), files, {**fields, **described}, origin, serve)
    return read_task(root, name, version)


def serving_alike(
    root: Path, name: str, lora: StoredLora, fields: Mapping[str, Any], origin: Origin
) -> TaskEntry | None:
    """The serving version of a task, if `publish_lora` would publish it once more.

    Args are those of `publish_lora`.

    Returns:
        The version; None if another one serves, or none, or its files are damaged: to publish it
        again mends the task.
    """
    version = read_channels(root).version(task_channel(name))
    if version is None:
        return None
    try:
        entry = read_task(root, name, version)
        entry.read()
    except StoreError:
        return None
    base = origin["base"]
    digest = files_digest(_files(TASK_FILES, *lora_to_peft(lora, base_name=base.name)))
    manifest = entry.manifest
    wanted = (digest, base.digest, origin["licence"], *fields.values())
    served = (entry.digest, manifest.base.digest, manifest.licence)
    described = tuple(getattr(manifest, field) for field in fields)
    return entry if (*served, *described) == wanted else None


def publish_backbone(
    root: Path,
    backbone: Backbone,
    lineage: Sequence[str],
    blend: Blend | None,
    origin: Origin,
    serve: bool,
) -> BackboneEntry:
    """Publishes a backbone with its certificate.

    Args and errors are those of `AdapterStore.publish_backbone`.
    """
    from crma.method.backbone import Backbone
    from crma.method.certificate import certify

    Backbone.from_tensors(backbone.config, backbone.tensors())  # proves that it can be loaded
    known = backbones(root)
    for digest in lineage:
        if digest in known:
            _check_ancestor(known[digest], lineage, origin["base"])
    parent = known[lineage[0]].load() if lineage and lineage[0] in known else None
    fields = {
        "config": backbone.config,
        "lineage": lineage,
        "blend": blend,
        "certificate": certify(backbone, parent),
    }
    version = _publish(root, BACKBONE, _backbone_files(backbone), fields, origin, serve)
    return read_backbone(root, version)


def backbone_digest(backbone: Backbone) -> str:
    """The digest that a backbone is published under."""
    return files_digest(_backbone_files(backbone))


def _publish(
    root: Path,
    channel: str,
    files: Mapping[str, bytes],
    fields: Mapping[str, Any],
    origin: Origin,
    serve: bool,
) -> str:
    """Writes the next version of a channel, and serves it if asked to. Returns the version."""
    kind = BackboneManifest if channel == BACKBONE else TaskManifest
    base = {"name": origin["base"].name, "digest": origin["base"].digest}
    with locked(root):
        channels = read_channels(root)
        # Not the number of a removed version either: it would be another adapter by now.
        taken = {*versions_in(root, channel), *channels.versions_named(channel)}
        newest = max((int(version.removeprefix("v")) for version in taken), default=0)
        version = f"v{newest + 1}"
        described = {**origin, **fields, "base": base, "version": version, "created": now()}
        folder = root / channel_folder(channel) / version
        complete = add_manifest(kind, files, **described)
        if not serve:
            publish_folder(root, folder, complete)
            return version
        after = channels.serve(channel, version)
        check_change(root, channels, after, _entry_of(channel, folder, complete))
        publish_folder(root, folder, complete)
        write_channels(root, after)
    return version


def _entry_of(channel: str, folder: Path, files: Mapping[str, bytes]) -> Entry:
    """The entry of a version that is not on the disk yet."""
    manifest = files[MANIFEST]
    if channel == BACKBONE:
        return BackboneEntry(folder, parse_record(BackboneManifest, manifest, MANIFEST))
    return TaskEntry(folder, parse_record(TaskManifest, manifest, MANIFEST))


def backbones(root: Path) -> dict[str, BackboneEntry]:
    """Digest -> entry, of every published backbone."""
    entries = (read_backbone(root, version) for version in versions_in(root, BACKBONE))
    return {entry.digest: entry for entry in entries}


def _check_trained_on(root: Path, backbone: str, base: BaseModel) -> None:
    """Raises LineageMismatch if a LoRA trained on this backbone could never serve under CRMA."""
    known = [
        entry for entry in backbones(root).values() if entry.manifest.base.digest == base.digest
    ]
    if not any(entry.descends_from(backbone) for entry in known):
        message = (
            "The store holds neither this backbone nor a descendant for this base model: "
            "publish it first."
        )
        allowed = [entry.digest for entry in known]
        raise LineageMismatch(message, field="backbone", value=backbone, allowed=allowed)


def _check_ancestor(ancestor: BackboneEntry, lineage: Sequence[str], base: BaseModel) -> None:
    """A backbone with this lineage and base model may call `ancestor` its ancestor."""
    ancestor.check_base(base.digest)
    forgotten = [digest for digest in ancestor.manifest.lineage if digest not in lineage]
    if forgotten:
        message = (
            f"The lineage leaves out ancestors of {ancestor.version}: "
            "the LoRAs trained on them would stop serving."
        )
        allowed = f"with {forgotten}"
        raise LineageMismatch(message, field="lineage", value=list(lineage), allowed=allowed)


def _files(
    names: tuple[str, str], config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, bytes]:
    """File name -> bytes, of a config and its weights."""
    config_name, weights_name = names
    return {config_name: to_json(config), weights_name: write_tensors(tensors)}


def _backbone_files(backbone: Backbone) -> dict[str, bytes]:
    tensors = {name: StoredTensor.of(tensor) for name, tensor in backbone.tensors().items()}
    return _files(BACKBONE_FILES, backbone.config.to_dict(), tensors)
