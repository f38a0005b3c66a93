"""Removes versions of a task that nothing serves."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from crma.core.errors import NotFound, VersionServes
from crma.core.files import TEMPORARY_PREFIX, locked, names_in, sync_folder
from crma.store.channels import channel_folder, read_channels, task_channel
from crma.store.entry import versions_in
from crma.store.signature import signature_path


def remove_task(root: Path, name: str, version: str | None) -> tuple[str, ...]:
    """Removes one version of a task, or all of them.

    A version disappears whole. Its number is not given out again while the history names it.

    Args:
        root: of the store.
        name: of the task.
        version: None: every version.

    Returns:
        The versions that were removed.

    Raises:
        NotFound: there is no such task or version.
        VersionServes: a version to remove serves; nothing is removed.
        InvalidAdapter: the name is not valid.
    """
    channel = task_channel(name)
    with locked(root):
        published = versions_in(root, channel)
        removed = published if version is None else (version,)
        if not removed or not set(removed) <= set(published):
            asked = name if version is None else f"{name}@{version}"
            allowed = [f"{name}@{each}" for each in published] or sorted(names_in(root, "tasks"))
            raise NotFound(f"no task {asked!r}", field="task", value=asked, allowed=allowed)
        serving = read_channels(root).version(channel)
        if serving in removed:
            message = f"{name}@{serving} serves: let another version serve, or none, first"
            value = f"{name}@{serving}"
            rule = "a version that does not serve"
            raise VersionServes(message, field="task", value=value, allowed=rule)
        _remove(root, root / channel_folder(channel), removed, whole=removed == published)
        for each in removed:  # else it would be that of a later version with this number
            signature_path(root, f"{channel}/{each}").unlink(missing_ok=True)
    return removed


def _remove(root: Path, task: Path, versions: Sequence[str], *, whole: bool) -> None:
    """Moves folders out of sight in one step each, then deletes what is in them.

    What a process that dies here leaves, the next writer deletes.
    """
    trash = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=root))
    try:
        moved = [task] if whole else [task / version for version in versions]
        for folder in moved:
            os.rename(folder, trash / folder.name)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(trash, ignore_errors=True)
