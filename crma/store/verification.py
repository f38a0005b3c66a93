"""Checks a whole store and collects every problem, instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from crma.store.version_stamp import Stamp, version_stamp


@dataclass(frozen=True)
class SoundVersion:
    """A version that was read whole, and has no problem of its own.

    Attributes:
        entry: its manifest.
        stamp: what it looked like before it was read.
        num_parameters: numbers in its tensors.
    """

    entry: Entry
    stamp: Stamp
    num_parameters: int


@dataclass(frozen=True)
class Examination:
    """What reading a whole store once has found.

    Attributes:
        problems: empty if the store is sound.
        sound: the versions without a problem.
    """

    problems: list[StoreError]
    sound: list[SoundVersion]


def examine(
    root: Path, base: BaseModel | None, shape: ModelShape | None, public_key: Path | None = None
) -> Examination:
    """Read and check every version of a store. Damage is reported, not raised.

    Args:
        root: of the store.
        base: if given, every entry must be made for this base model.
        shape: if given, every entry must fit a base model of this shape.
        public_key: if given, every entry must have a signature of this key.
    """
    problems: list[StoreError] = []
    sound = []
    stamped = _read_entries(root, public_key, problems)
    entries = [entry for entry, _ in stamped]
    channels = _read_channels(root, entries, problems)
    for entry, stamp in stamped:
        num_before = len(problems)
        num_parameters = 0
        with _collected(problems):
            num_parameters = check_entry(entry, base, shape)
        if public_key is not None:
            with _collected(problems):
                check_signature(root, entry, public_key)
        if len(problems) == num_before:
            sound.append(SoundVersion(entry, stamp, num_parameters))
    _check_lineages(entries, channels, problems)
    return Examination(problems, sound)


def _read_entries(
    root: Path, public_key: Path | None, problems: list[StoreError]
) -> list[tuple[Entry, Stamp]]:
    """The entries whose folder and manifest are sound, with the stamps that they had before."""
    entries: list[tuple[Entry, Stamp]] = []
    tasks = _valid_names(root, "tasks", task_channel, problems)
    for channel in (BACKBONE, *map(task_channel, tasks)):
        folder = channel_folder(channel)
        for version in _valid_names(root, folder, check_version, problems):
            stamp = version_stamp(root, f"{folder}/{version}", public_key)
            with _collected(problems):
                entries.append((read_entry(root, channel, version), stamp))
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


def check_entry(entry: Entry, base: BaseModel | None, shape: ModelShape | None) -> int:
    """Read the weights of an entry. Args are those of `examine`.

    The base model first: an entry for another one rarely fits this one's shape either.

    Returns:
        How many numbers its tensors hold.

    Raises:
        StoreError: the entry is damaged.
    """
    if base is not None:
        entry.check_base(base.digest)
    if isinstance(entry, TaskEntry):
        return entry.num_parameters(shape)
    from crma.method.certificate import certify

    backbone = entry.load(shape)
    entry.check_certificate(certify(backbone))
    return sum(tensor.numel() for tensor in backbone.parameters())


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
