"""`channels.json`: which version of each task and of the backbone serves, and how that came to be.

A channel is `backbone` or `tasks/<name>`. The file is replaced whole, under the store's lock: readers need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from crma.errors import InvalidAdapter, NotFound
from crma.files import read_regular, replace_file, to_json
from crma.manifest import Json, check_name, check_version, parse_record

CHANNELS = "channels.json"
BACKBONE = "backbone"
MAX_BYTES = 64 * 2**20


def task_channel(name: str) -> str:
    """The channel of a task. Raises InvalidAdapter if the name is none."""
    return f"tasks/{check_name(name)}"


def channel_task(channel: str) -> str:
    """The task of a channel `tasks/<name>`. Raises InvalidAdapter."""
    folder, _, name = channel.partition("/")
    if folder != "tasks":
        raise InvalidAdapter("Not a channel.", field="channel", value=channel, allowed=f"{BACKBONE} or tasks/<name>")
    return check_name(name)


class Change(BaseModel):
    """One line of history: `channel` went from one version to another; null is "nothing serves"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    time: str
    channel: str
    action: Literal["serve", "roll_back"]
    before: str | None = Field(alias="from")
    after: str | None = Field(alias="to")
    evidence: Json | None = None


class Channels(BaseModel):
    """The content of `channels.json`. Changes return a new value; `write` makes it count."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    backbone: str | None = None
    tasks: dict[str, str] = Field(default_factory=dict)
    history: tuple[Change, ...] = ()

    def version(self, channel: str) -> str | None:
        """The version that serves, or None. Raises InvalidAdapter if there can be no such channel."""
        return self.backbone if channel == BACKBONE else self.tasks.get(channel_task(channel))

    def serve(self, channel: str, version: str | None, evidence: Mapping[str, Any] | None = None) -> Channels:
        """`version` serves from now on (None: nothing does). Where it does already, nothing is recorded."""
        if version == self.version(channel):
            return self
        return self._change("serve", channel, version, evidence)

    def roll_back(self, channel: str, evidence: Mapping[str, Any] | None = None) -> Channels:
        """What served before the current version serves again; done twice, it goes back two versions.

        Raises:
            NotFound: nothing served before.
        """
        past = self._past(channel)
        if not past:
            raise NotFound(
                f"{channel}: nothing to roll back to.", field="channel", value=channel, allowed="a channel that changed"
            )
        return self._change("roll_back", channel, past[-1], evidence)

    def check_integrity(self) -> None:
        """The history ends in what serves. Raises InvalidAdapter."""
        replayed: dict[str, str | None] = {}
        for change in self.history:
            if replayed.get(change.channel) != change.before:
                raise InvalidAdapter(f"{CHANNELS}: the history has a gap.", field="history", value=change.channel)
            replayed[change.channel] = change.after
        current = {BACKBONE: self.backbone, **{task_channel(name): version for name, version in self.tasks.items()}}
        for channel in {*replayed, *current}:
            if replayed.get(channel) != current.get(channel):
                raise InvalidAdapter(
                    f"{CHANNELS}: {channel} is not what its history says.",
                    field=channel,
                    value=current.get(channel),
                    allowed=replayed.get(channel),
                )

    def _past(self, channel: str) -> list[str | None]:
        """The versions that served before, oldest first: a roll-back takes the last one off."""
        past: list[str | None] = []
        for change in self.history:
            if change.channel == channel:
                if change.action == "serve":
                    past.append(change.before)
                elif past:
                    past.pop()
        return past

    def _change(
        self,
        action: Literal["serve", "roll_back"],
        channel: str,
        version: str | None,
        evidence: Mapping[str, Any] | None,
    ) -> Channels:
        values = {
            "time": now(),
            "channel": channel,
            "action": action,
            "from": self.version(channel),
            "to": version,
            "evidence": None if evidence is None else dict(evidence),
        }
        change = parse_record(Change, to_json(values), CHANNELS)
        update: dict[str, Any] = {"history": (*self.history, change)}
        if channel == BACKBONE:
            update["backbone"] = version
        else:
            name = channel_task(channel)
            tasks = {other: serving for other, serving in self.tasks.items() if other != name}
            update["tasks"] = tasks if version is None else {**tasks, name: version}
        return self.model_copy(update=update)


def read_channels(root: Path) -> Channels:
    """The channels of a store; empty if it has none yet. Raises InvalidAdapter if the file is damaged."""
    path = root / CHANNELS
    if not path.is_symlink() and not path.exists():
        return Channels()
    channels = parse_record(Channels, read_regular(path, MAX_BYTES), CHANNELS)
    for name, version in channels.tasks.items():
        check_name(name)
        check_version(version)
    if channels.backbone is not None:
        check_version(channels.backbone)
    return channels


def write_channels(root: Path, channels: Channels) -> None:
    """Replaces the file. Call with the store's lock held."""
    replace_file(root / CHANNELS, to_json(channels.model_dump(mode="json", by_alias=True)))


def now() -> str:
    """The time in UTC, to the second: 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
