"""`channels.json`: which version of each task and of the backbone serves, and how that came to be.

A channel is `backbone` or `tasks/<name>`. The file is replaced whole, under the store's lock: readers need none.
"""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from crma.core.errors import NotFound
from crma.core.files import invalid, read_regular, replace_file, to_json
from crma.store.manifest import Json, Name, Record, Version, check_name, parse_record

CHANNELS = "channels.json"
BACKBONE = "backbone"
MAX_BYTES = 64 * 2**20


def task_channel(name: str) -> str:
    """The channel of a task. Raises InvalidAdapter if the name is none."""
    return f"tasks/{check_name(name)}"


def channel_task(channel: str) -> str:
    """The task of a channel `tasks/<name>`. Raises InvalidAdapter if it is no such channel."""
    folder, _, name = channel.partition("/")
    if folder != "tasks":
        raise invalid("Not a channel.", "channel", channel, f"{BACKBONE} or tasks/<name>")
    return check_name(name)


def channel_folder(channel: str) -> str:
    """Where in the store its versions are. Raises InvalidAdapter if there can be no such channel."""
    return "backbones" if channel == BACKBONE else task_channel(channel_task(channel))


class Change(Record):
    """One line of history: `channel` went from one version to another; null is "nothing serves"."""

    time: str
    channel: str
    action: Literal["serve", "roll_back", "keep"]
    before: Version | None = Field(alias="from")
    after: Version | None = Field(alias="to")
    evidence: Json | None = None


class Channels(Record):
    """The content of `channels.json`. Changes return a new value; `write_channels` makes it count."""

    format: Literal[1] = 1
    backbone: Version | None = None
    tasks: dict[Name, Version] = Field(default_factory=dict)
    history: tuple[Change, ...] = ()

    def serving(self) -> dict[str, str]:
        """Channel -> version of all that serves."""
        tasks = {task_channel(name): version for name, version in self.tasks.items()}
        return tasks if self.backbone is None else {BACKBONE: self.backbone, **tasks}

    def version(self, channel: str) -> str | None:
        """The version that serves, or None. Raises InvalidAdapter if there can be no such channel."""
        return self.backbone if channel == BACKBONE else self.tasks.get(channel_task(channel))

    def serve(
        self, channel: str, version: str | None, evidence: Mapping[str, Any] | None = None
    ) -> "Channels":
        """`version` serves from now on (None: nothing does). Where it does already, nothing is recorded."""
        return (
            self
            if version == self.version(channel)
            else self._change("serve", channel, version, evidence)
        )

    def keep(self, channel: str, evidence: Mapping[str, Any]) -> "Channels":
        """What serves goes on serving, and why it was not replaced is recorded."""
        return self._change("keep", channel, self.version(channel), evidence)

    def roll_back(self, channel: str, evidence: Mapping[str, Any] | None = None) -> "Channels":
        """What served before the current version serves again; done twice, it goes back two versions.

        Raises:
            NotFound: nothing served before.
        """
        past: list[str | None] = []
        for change in self.history:
            if change.channel == channel:
                if change.action == "serve":
                    past.append(change.before)
                elif change.action == "roll_back" and past:
                    past.pop()
        if not past:
            message = f"{channel}: nothing to roll back to."
            raise NotFound(
                message, field="channel", value=channel, allowed="a channel that changed"
            )
        return self._change("roll_back", channel, past[-1], evidence)

    def check_integrity(self) -> None:
        """The history has no gap and ends in what serves. Raises InvalidAdapter."""
        replayed: dict[str, str | None] = {}
        for change in self.history:
            if replayed.get(change.channel) != change.before:
                raise invalid(
                    "The history has a gap.", CHANNELS, change.before, replayed.get(change.channel)
                )
            replayed[change.channel] = change.after
        expected = {
            channel: version for channel, version in replayed.items() if version is not None
        }
        if self.serving() != expected:
            raise invalid(
                "What serves is not what the history says.", CHANNELS, self.serving(), expected
            )

    def _change(
        self, action: str, channel: str, version: str | None, evidence: Mapping[str, Any] | None
    ) -> "Channels":
        values = {
            "channel": channel,
            "action": action,
            "from": self.version(channel),
            "to": version,
        }
        change = parse_record(
            Change, to_json({**values, "time": now(), "evidence": evidence}), CHANNELS
        )
        serving = {**self.serving(), channel: version}
        backbone = serving.pop(BACKBONE, None)
        tasks = {
            channel_task(channel): version
            for channel, version in serving.items()
            if version is not None
        }
        return Channels(backbone=backbone, tasks=tasks, history=(*self.history, change))


def read_channels(root: Path) -> Channels:
    """The channels of a store; empty if it has none yet. Raises InvalidAdapter if the file is damaged."""
    path = root / CHANNELS
    if not os.path.lexists(path):
        return Channels()
    return parse_record(Channels, read_regular(path, MAX_BYTES), CHANNELS)


def write_channels(root: Path, channels: Channels) -> None:
    """Replaces the file. Call with the store's lock held."""
    replace_file(root / CHANNELS, to_json(channels))


def now() -> str:
    """The time in UTC, to the second: 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
