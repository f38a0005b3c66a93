"""`channels.json`: which version of each task and of the backbone serves, and the history of that.

A channel is `backbone` or `tasks/<name>`. The file is replaced whole, under the store's lock, so
readers need no lock.
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
    """The channel of a task. Raises InvalidAdapter if the name is not valid."""
    return f"tasks/{check_name(name)}"


def channel_task(channel: str) -> str:
    """The task of a channel `tasks/<name>`. Raises InvalidAdapter for any other channel."""
    folder, _, name = channel.partition("/")
    if folder != "tasks":
        raise invalid("Not a channel.", "channel", channel, f"{BACKBONE} or tasks/<name>")
    return check_name(name)


def channel_folder(channel: str) -> str:
    """The folder of its versions, relative to the store's root.

    Raises InvalidAdapter if there can be no such channel.
    """
    return "backbones" if channel == BACKBONE else task_channel(channel_task(channel))


class Change(Record):
    """One line of history: a channel moved from one version to another.

    `before` and `after` are "from" and "to" in JSON; null means that nothing serves.
    """

    time: str
    channel: str
    action: Literal["serve", "roll_back", "keep"]
    before: Version | None = Field(alias="from")
    after: Version | None = Field(alias="to")
    evidence: Json | None = None


class Channels(Record):
    """The content of `channels.json`.

    Methods that change it return a new value, which counts once `write_channels` has written it.
    """

    format: Literal[1] = 1
    backbone: Version | None = None
    tasks: dict[Name, Version] = Field(default_factory=dict)
    history: tuple[Change, ...] = ()

    def serving(self) -> dict[str, str]:
        """Channel -> version, for every channel that serves one."""
        tasks = {task_channel(name): version for name, version in self.tasks.items()}
        return tasks if self.backbone is None else {BACKBONE: self.backbone, **tasks}

    def version(self, channel: str) -> str | None:
        """The version that a channel serves, or None.

        Raises InvalidAdapter if there can be no such channel.
        """
        return self.backbone if channel == BACKBONE else self.tasks.get(channel_task(channel))

    def versions_named(self, channel: str) -> set[str]:
        """Every version of a channel that the history names, published still or not."""
        changes = [change for change in self.history if change.channel == channel]
        named = {version for change in changes for version in (change.before, change.after)}
        return {version for version in named if version is not None}

    def serve(
        self, channel: str, version: str | None, evidence: Mapping[str, Any] | None = None
    ) -> "Channels":
        """A channel serves `version` from now on; None means nothing.

        If it already does, nothing is recorded.
        """
        if version == self.version(channel):
            return self
        return self._change("serve", channel, version, evidence)

    def keep(self, channel: str, evidence: Mapping[str, Any]) -> "Channels":
        """Records why a channel's version was not replaced."""
        return self._change("keep", channel, self.version(channel), evidence)

    def roll_back(self, channel: str, evidence: Mapping[str, Any] | None = None) -> "Channels":
        """Undoes the last `serve` that is not undone yet, so two calls go back two versions.

        Raises:
            NotFound: there is none.
        """
        past: list[str | None] = []
        for change in self.history:
            if change.channel != channel:
                continue
            if change.action == "serve":
                past.append(change.before)
            elif change.action == "roll_back" and past:
                past.pop()
        if not past:
            raise self._no_past(channel)
        return self._change("roll_back", channel, past[-1], evidence)

    def check_integrity(self) -> None:
        """The history has no gap and ends in what serves. Raises InvalidAdapter otherwise."""
        replayed: dict[str, str | None] = {}
        for change in self.history:
            known = replayed.get(change.channel)
            if known != change.before:
                raise invalid("The history has a gap.", CHANNELS, change.before, known)
            replayed[change.channel] = change.after
        expected = {
            channel: version for channel, version in replayed.items() if version is not None
        }
        serving = self.serving()
        if serving != expected:
            message = "The serving versions are not those at the end of the history."
            raise invalid(message, CHANNELS, serving, expected)

    def _no_past(self, channel: str) -> NotFound:
        """The error for a channel that has nothing to go back to, or that there never was."""
        known = sorted({BACKBONE, *(change.channel for change in self.history)})
        if channel in known:
            message = f"{channel}: there is no earlier version to roll back to."
            allowed: object = "a channel that has changed"
        else:
            message = f"there is no channel {channel!r} in this store."
            allowed = ", ".join(known)
        return NotFound(message, field="channel", value=channel, allowed=allowed)

    def _change(
        self, action: str, channel: str, version: str | None, evidence: Mapping[str, Any] | None
    ) -> "Channels":
        values = {
            "time": now(),
            "channel": channel,
            "action": action,
            "from": self.version(channel),
            "to": version,
            "evidence": evidence,
        }
        change = parse_record(Change, to_json(values), CHANNELS)
        backbone = self.backbone
        tasks = dict(self.tasks)
        if channel == BACKBONE:
            backbone = version
        elif version is None:
            tasks.pop(channel_task(channel), None)
        else:
            tasks[channel_task(channel)] = version
        return Channels(backbone=backbone, tasks=tasks, history=(*self.history, change))


def read_channels(root: Path) -> Channels:
    """The channels of a store; empty if it has no file yet.

    Raises InvalidAdapter if the file is damaged.
    """
    path = root / CHANNELS
    if not os.path.lexists(path):
        return Channels()
    return parse_record(Channels, read_regular(path, MAX_BYTES), CHANNELS)


def write_channels(root: Path, channels: Channels) -> None:
    """Replaces `channels.json`. Call it with the store's lock held."""
    replace_file(root / CHANNELS, to_json(channels))


def now() -> str:
    """The current time in UTC, to the second: 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def nothing_before(channel: str, serving: Channels) -> NotFound:
    """The error for a roll back to nothing, which would stop the task in silence.

    Without a backbone, every task that was trained on one would be refused.
    """
    version = serving.version(channel)
    if channel == BACKBONE:
        message = f"No backbone served before {version}, so it cannot be rolled back."
        allowed = "a backbone that was replaced"
    else:
        message = (
            f"Nothing served before {version} of {channel}, so it cannot be rolled back: publish "
            "another version (crma store import, crma train --ship)."
        )
        allowed = "a task whose version was replaced"
    return NotFound(message, field="channel", value=channel, allowed=allowed)
