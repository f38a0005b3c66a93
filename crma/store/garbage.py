"""Versions of tasks that nothing needs any more."""

from pathlib import Path

from crma.core.errors import NotFound
from crma.core.files import names_in
from crma.store.channels import Channels, read_channels, task_channel
from crma.store.entry import versions_in


def outdated(root: Path) -> dict[str, tuple[str, ...]]:
    """The versions of each serving task that came before those that may still be wanted.

    Kept are the version that serves, the one that a roll back would serve, whatever is newer than
    these, and all versions of a task that does not serve. Backbones are never outdated: the lineage
    of adapters leads to them.

    Returns:
        Task -> its outdated versions, oldest first; without tasks that have none.

    Raises:
        InvalidAdapter: `channels.json` is damaged, or a name is not valid.
    """
    channels = read_channels(root)
    found = {}
    for name in sorted(names_in(root, "tasks")):
        wanted = _wanted(channels, task_channel(name))
        versions = versions_in(root, task_channel(name))
        places = [versions.index(version) for version in wanted if version in versions]
        old = versions[: min(places, default=0)]
        if old:
            found[name] = old
    return found


def _wanted(channels: Channels, channel: str) -> list[str]:
    """The version that a channel serves and the one that it would roll back to, if any."""
    serving = channels.version(channel)
    if serving is None:
        return []
    try:
        earlier = channels.roll_back(channel).version(channel)
    except NotFound:
        earlier = None
    return [serving] if earlier is None else [serving, earlier]
