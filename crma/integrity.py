"""What can be wrong with a store: its structure (cheap: no weights are read) and its content (every byte)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from crma.channels import BACKBONE, read_channels, task_channel
from crma.entry import (
    BackboneEntry,
    Shapes,
    TaskEntry,
    about,
    check_listing,
    plain_folder,
    read_backbone,
    read_task,
)
from crma.errors import BaseMismatch, InvalidAdapter, LineageMismatch, NotFound, StoreError
from crma.manifest import NAME_PATTERN, VERSION_PATTERN, check_name

Entry = TaskEntry | BackboneEntry


def structural_problems(root: Path) -> list[StoreError]:
    """Folders that are no entries, wrong listings, damaged manifests, channels that name what is not there."""
    entries, problems = _read_entries(root)
    published = {(_channel(entry), entry.version) for entry in entries}
    with _collected(problems):
        channels = read_channels(root)
        channels.check_integrity()
        serving = [(task_channel(name), version) for name, version in channels.tasks.items()]
        serving += [(BACKBONE, channels.backbone)] if channels.backbone is not None else []
        for channel, version in serving:
            if (channel, version) not in published:
                message = f"{channel}: serves {version}, which is not in the store, or damaged."
                problems.append(NotFound(message, field=channel, value=version, allowed="a published version"))
    return problems


def content_problems(root: Path, base_digest: str | None, shapes: Shapes | None) -> list[StoreError]:
    """Wrong digests, weights that cannot be used or do not fit, other base models, broken lineages."""
    problems: list[StoreError] = []
    entries, _ = _read_entries(root)
    for entry in entries:
        with _collected(problems):
            entry.load(shapes)
        made_for = entry.manifest.base
        if base_digest is not None and made_for.digest != base_digest:
            message = f"{_channel(entry)}/{entry.version}: made for another base model, {made_for.name}."
            problems.append(BaseMismatch(message, field="base", value=made_for.digest, allowed=base_digest))
    backbones = [entry for entry in entries if isinstance(entry, BackboneEntry)]
    with _collected([]):  # damaged channels are a structural problem
        channels = read_channels(root)
        serving = [entry for entry in backbones if entry.version == channels.backbone]
        for task in entries:
            if isinstance(task, TaskEntry):
                serves = channels.tasks.get(task.name) == task.version
                problems.extend(_lineage_problems(task, serving if serves and serving else backbones))
    return problems


def _lineage_problems(task: TaskEntry, backbones: Sequence[BackboneEntry]) -> Iterator[LineageMismatch]:
    """A task trained on a backbone needs one of these: the serving one if both serve, any in the store otherwise."""
    trained_on = task.manifest.backbone
    if trained_on is not None and not any(backbone.descends_from(trained_on) for backbone in backbones):
        yield LineageMismatch(
            f"tasks/{task.name}/{task.version}: cannot serve with CRMA on: no backbone is its own or descends from it.",
            field="backbone",
            value=trained_on,
            allowed=[backbone.digest for backbone in backbones],
        )


def _read_entries(root: Path) -> tuple[list[Entry], list[StoreError]]:
    """Every entry with a sound manifest and listing, and what is wrong with the others."""
    entries: list[Entry] = []
    problems: list[StoreError] = []
    for name in _names(root, "tasks", pattern=NAME_PATTERN, problems=problems):
        for version in _names(root, "tasks", name, pattern=VERSION_PATTERN, problems=problems):
            with _collected(problems), about(f"tasks/{name}/{version}"):
                task = read_task(root, check_name(name), version)
                check_listing(task.path, task.manifest.files)
                entries.append(task)
    for version in _names(root, "backbones", pattern=VERSION_PATTERN, problems=problems):
        with _collected(problems), about(f"backbones/{version}"):
            backbone = read_backbone(root, version)
            check_listing(backbone.path, backbone.manifest.files)
            entries.append(backbone)
    return entries, problems


def _names(root: Path, *parts: str, pattern: str, problems: list[StoreError]) -> list[str]:
    """Names in a folder that match `pattern`, sorted; the others, and a folder that is a link, are problems."""
    names: list[str] = []
    with _collected(problems):
        try:
            names = sorted(os.listdir(plain_folder(root, *parts)))
        except NotFound:
            return []
    strange = [name for name in names if not re.fullmatch(pattern, name)]
    for name in strange:
        message = f"{'/'.join((*parts, name))}: does not belong here."
        problems.append(InvalidAdapter(message, field="path", value=name, allowed=pattern))
    return [name for name in names if name not in strange]


def _channel(entry: Entry) -> str:
    return task_channel(entry.name) if isinstance(entry, TaskEntry) else BACKBONE


@contextmanager
def _collected(problems: list[StoreError]) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        problems.append(error)
