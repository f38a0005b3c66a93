"""A copy of a store on another machine, in a folder that is read like any other store.

A version never changes, so it is fetched once. It appears here whole, and only if its files have
the digests of its manifest. `channels.json` is replaced last, once all that it lets serve is here:
a store that is copied to the other machine file by file, in whatever order, never serves by halves.
"""

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path

from crma.core.errors import NotFound, SourceUnavailable, StoreError
from crma.core.files import (
    MAX_JSON_BYTES,
    about,
    invalid,
    locked,
    names_in,
    publish_folder,
    read_regular,
    replace_file,
)
from crma.store.channels import CHANNELS, MAX_BYTES, Channels, channel_folder, task_channel
from crma.store.entry import MAX_WEIGHTS_BYTES, check_file, versions_in
from crma.store.manifest import (
    MANIFEST,
    NAME_PATTERN,
    VERSION_PATTERN,
    BackboneManifest,
    TaskManifest,
    parse_record,
)
from crma.store.removal import remove_task
from crma.store.signature import FOLDER as SIGNATURES
from crma.store.source import Source, SourceFile

LIST_EVERY_S = 60.0
QUESTION_SETS = "question_sets"
MAX_QUESTIONS_BYTES = 256 * 2**20

_VERSION = rf"(?:tasks/{NAME_PATTERN}|backbones)/{VERSION_PATTERN}"
_OF_A_VERSION = re.compile(rf"({_VERSION})/([^/]+)")
_LOOSE = re.compile(rf"{SIGNATURES}/{_VERSION}\.json|{QUESTION_SETS}/{NAME_PATTERN}\.jsonl")

Files = Mapping[str, SourceFile]


class Mirror:
    """Its methods are called one at a time. Several processes may share the folder.

    Args:
        source: the store. It is only read.
        root: the folder of the copy; made if it is missing.
        list_every_s: seconds after which all files are listed again, although the channels are the
            same: versions may be published that do not serve.

    Attributes:
        problems: why the copy is not all that the source has, as the last look found; empty if it
            is.
    """

    def __init__(self, source: Source, root: Path, list_every_s: float = LIST_EVERY_S) -> None:
        self.source = source
        self.root = root
        self.problems: tuple[StoreError, ...] = ()
        self._list_every_s = list_every_s
        self._found: tuple[StoreError, ...] = ()  # problems, when all files were listed
        self._channels_mark: str | None = None  # of the channels, at that time
        self._list_at = -math.inf
        self._refused: dict[str, tuple[Files, StoreError]] = {}  # by place: the files, and why
        self._marks: dict[str, str] = {}  # of the loose files that are here

    def copy(self) -> tuple[StoreError, ...]:
        """Fetch what is new, and return `problems`. Nothing is raised for them.

        If nothing is new, one question is asked. If the source cannot be read, or a version that it
        lets serve is not sound or not complete there, all that serves here goes on serving.
        """
        try:
            self.problems = self._look()
        except StoreError as error:
            self.problems = (_without_frames(error),)
        except OSError as error:
            message = f"the copy of {self.source.address} cannot be written: {error}"
            self.problems = (StoreError(message, field="store", value=str(self.root)),)
        return self.problems

    def _look(self) -> tuple[StoreError, ...]:
        channels_file = self.source.file(CHANNELS)
        if channels_file.mark == self._channels_mark and time.monotonic() < self._list_at:
            return self._found
        self._list_at = -math.inf  # if this look fails, the next begins again
        data = self._read(CHANNELS, channels_file, MAX_BYTES)
        with about(self.source.address):
            channels = parse_record(Channels, data, CHANNELS)
        files = self.source.files()  # after the channels: what they name is there by now
        self._copy_loose(files)
        refused = self._copy_versions(files)
        absent = [place for place in _serving(channels) if not (self.root / place).is_dir()]
        if not absent or not (self.root / CHANNELS).exists():
            self._replace(CHANNELS, data)
        if not absent:
            self._remove_versions(files, channels)
        incomplete = [self._incomplete(place) for place in absent if place not in refused]
        self._found = (*refused.values(), *incomplete)
        self._channels_mark = channels_file.mark
        if not incomplete:
            self._list_at = time.monotonic() + self._list_every_s
        return self._found

    # Versions -----------------------------------------------------------------------------------

    def _copy_versions(self, files: Files) -> dict[str, StoreError]:
        """Fetch the versions that are complete there and not here.

        Returns:
            Place -> what is wrong with a version that was refused, now or earlier.
        """
        earlier = self._refused
        self._refused = {}
        for place, of_version in _complete(files).items():
            if (self.root / place).is_dir():
                continue
            if place in earlier and earlier[place][0] == of_version:
                self._refused[place] = earlier[place]
                continue
            try:
                self._fetch(place, of_version)
            except SourceUnavailable:
                raise
            except StoreError as error:
                self._refused[place] = (of_version, _without_frames(error))
        return {place: error for place, (_, error) in self._refused.items()}

    def _fetch(self, place: str, files: Files) -> None:
        """Fetch a version. Raises StoreError that names it unless it is what was published."""
        kind = _kind(place)
        limits = {**_limits(kind), MANIFEST: MAX_JSON_BYTES}  # the manifest is written last
        contents = {
            name: self._read(f"{place}/{name}", files[name], limit)
            for name, limit in limits.items()
        }
        with about(self.source.place(place)):
            manifest = parse_record(kind, contents[MANIFEST], MANIFEST)
            manifest.check_place(place)
            for name, digest in manifest.files.items():
                check_file(name, contents[name], digest)
        with locked(self.root):
            if not (self.root / place).exists():
                publish_folder(self.root, self.root / place, contents)

    def _remove_versions(self, files: Files, channels: Channels) -> None:
        """Remove the versions of tasks that are no longer there, and do not serve."""
        kept = {match[1] for match in map(_OF_A_VERSION.fullmatch, files) if match}
        kept.update(_serving(channels))
        for name in names_in(self.root, "tasks"):
            for version in versions_in(self.root, task_channel(name)):
                if f"tasks/{name}/{version}" not in kept:
                    remove_task(self.root, name, version)

    def _incomplete(self, place: str) -> NotFound:
        where = self.source.place(place)
        message = f"{where} serves there, and is not complete there: what served here goes on"
        return NotFound(message, field="store", value=where, allowed="all files of a version")

    # Other files --------------------------------------------------------------------------------

    def _copy_loose(self, files: Files) -> None:
        """Signatures and question sets become those that are there. They may change."""
        there = {name: file for name, file in files.items() if _LOOSE.fullmatch(name)}
        for name, file in there.items():
            if self._marks.get(name) != file.mark:
                limit = MAX_QUESTIONS_BYTES if name.endswith(".jsonl") else MAX_JSON_BYTES
                self._replace(name, self._read(name, file, limit))
                self._marks[name] = file.mark
        for folder in (SIGNATURES, QUESTION_SETS):
            for path in (self.root / folder).rglob("*.json*"):
                if path.relative_to(self.root).as_posix() not in there:
                    with locked(self.root):
                        path.unlink(missing_ok=True)

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file, unless it is there already: its time tells readers that it changed."""
        path = self.root / name
        if path.is_file() and read_regular(path, MAX_QUESTIONS_BYTES) == data:
            return
        with locked(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)

    def _read(self, name: str, file: SourceFile, limit: int) -> bytes:
        """Read a file. Raises InvalidAdapter if it is larger than `limit` bytes."""
        if file.size > limit:
            where = self.source.place(name)
            raise invalid("Too large.", where, file.size, f"<= {limit} bytes")
        return self.source.read(name)


def _without_frames(error: StoreError) -> StoreError:
    """An error that is kept: its traceback would keep the bytes that were read."""
    return error.with_traceback(None)


def _serving(channels: Channels) -> list[str]:
    """The places of the versions that serve."""
    serving = channels.serving().items()
    return [f"{channel_folder(channel)}/{version}" for channel, version in serving]


def _kind(place: str) -> type[TaskManifest] | type[BackboneManifest]:
    return BackboneManifest if place.startswith("backbones/") else TaskManifest


def _limits(kind: type[TaskManifest] | type[BackboneManifest]) -> dict[str, int]:
    """The most bytes of each file of a version, without its manifest."""
    config, weights = kind.FILES
    return {config: MAX_JSON_BYTES, weights: MAX_WEIGHTS_BYTES}


def _complete(files: Files) -> dict[str, Files]:
    """The files of each version that has all of its kind, by place, then name.

    Nothing becomes a path but what has the form of a name in a store.
    """
    found: dict[str, dict[str, SourceFile]] = {}
    for name, file in files.items():
        match = _OF_A_VERSION.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], {})[match[2]] = file
    complete: dict[str, Files] = {}
    for place, of_version in found.items():
        names = (MANIFEST, *_kind(place).FILES)
        if of_version.keys() >= set(names):
            complete[place] = {name: of_version[name] for name in names}
    return complete
