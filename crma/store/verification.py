"""Checks a whole store and collects every problem, instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from crma.core.errors import InvalidAdapter, LineageMismatch, NotFound, StoreError
from crma.core.files import invalid, names_in
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.store.channels import BACKBONE, Channels, channel_folder, read_channels, task_channel
from crma.store.entry import BackboneEntry, TaskEntry, read_entry
from crma.store.manifest import check_version
from crma.store.serving import Entry, lineage_problem
from crma.store.signature import check_signature


def find_problems(
    root: Path, base: BaseModel | None, shape: ModelShape | None, public_key: Path | None = None
) -> list[StoreError]:
    """Every problem of a store; empty if it is sound. Damage is reported, not raised.

    Args:
        root: of the store.
        base: if given, every entry must be made for this base model.
        shape: if given, every entry must fit a base model of this shape.
        public_key: if given, every entry must have a signature of this key.
    """
    problems: list[StoreError] = []
    entries = _read_entries(root, problems)
    channels = _read_channels(root, entries, problems)
    for entry in entries:
        with _collected(problems):
            check_entry(entry, base, shape)
        if public_key is not None:
            with _collected(problems):
                check_signature(root, entry, public_key)
    _check_lineages(entries, channels, problems)
    return problems


def _read_entries(root: Path, problems: list[StoreError]) -> list[Entry]:
    """The entries whose folder and manifest are sound."""
    entries: list[Entry] = []
    tasks = _valid_names(root, "tasks", task_channel, problems)
    for channel in (BACKBONE, *map(task_channel, tasks)):
        for version in _valid_names(root, channel_folder(channel), check_version, problems):
            with _collected(problems):
                entries.append(read_entry(root, channel, version))
    return entries


def _read_channels(root: Path, entries: Sequence[Entry], problems: list[StoreError]) -> Channels:
    """The channels, or none if their file is damaged. Each must serve one of the entries."""
    channels = Channels()
    with _collected(problems):
        channels = read_channels(root)
        channels.check_integrity()
        published = {entry.manifest.place for entry in entries}
        for channel, version in channels.serving().items():
            if f"{channel_folder(channel)}/{version}" not in published:
                message = f"{channel}: serves {version}, which is missing or damaged."
                allowed = "a published version"
                problems.append(NotFound(message, field=channel, value=version, allowed=allowed))
    return channels


def check_entry(entry: Entry, base: BaseModel | None, shape: ModelShape | None) -> None:
    """Raises StoreError if an entry is damaged. Args are those of `find_problems`.

    The base model first: an entry for another one rarely fits this one's shape either.
    """
    if base is not None:
        entry.check_base(base.digest)
    if isinstance(entry, TaskEntry):
        entry.read(shape)
        return
    from crma.method.certificate import certify

    entry.check_certificate(certify(entry.load(shape)))


def _check_lineages(
    entries: Sequence[Entry], channels: Channels, problems: list[StoreError]
) -> None:
    """Every task that was trained on a backbone has one to serve under.

    That must be the serving backbone if the task serves too, and may be any in the store otherwise.
    """
    backbones = [entry for entry in entries if isinstance(entry, BackboneEntry)]
    serving = next((each for each in backbones if each.version == channels.backbone), None)
    for task in entries:
        if not isinstance(task, TaskEntry):
            continue
        if channels.tasks.get(task.name) == task.version:
            problem = lineage_problem(task, serving)
            if problem is not None:
                problems.append(problem)
        elif not task.fits_lineage(backbones):
            message = f"{task.manifest.place}: neither its backbone nor a descendant is here."
            allowed = [backbone.digest for backbone in backbones]
            trained_on = task.manifest.backbone
            problems.append(
                LineageMismatch(message, field="backbone", value=trained_on, allowed=allowed)
            )


def _valid_names(
    root: Path, place: str, check: Callable[[str], object], problems: list[StoreError]
) -> list[str]:
    """The names in a folder that pass `check`, sorted.

    The other names are problems, and so is a folder that is a link.
    """
    names: list[str] = []
    with _collected(problems):
        for name in sorted(names_in(root, place)):
            try:
                check(name)
                names.append(name)
            except InvalidAdapter as error:
                message = "does not belong here."
                problems.append(invalid(message, f"{place}/{name}", name, error.allowed))
    return names


@contextmanager
def _collected(problems: list[StoreError]) -> Iterator[None]:
    """A store error ends the block and becomes one of the problems."""
    try:
        yield
    except StoreError as error:
        problems.append(error)
