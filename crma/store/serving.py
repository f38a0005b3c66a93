"""What may serve together. A LoRA trained on a backbone needs that one, or a descendant of it.

A request chooses both (`check_selection`). A task that serves needs its backbone to serve too: no
change of the channels may take that from it (`check_change`), and a store in which it was taken
otherwise is reported by `verification`.
"""

from pathlib import Path

from crma.core.errors import LineageMismatch, StoreError
from crma.store.channels import Channels
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone, read_task

Entry = TaskEntry | BackboneEntry


def check_selection(
    task: TaskEntry | None, backbone: BackboneEntry | None, base_digest: str
) -> None:
    """Whether the two may serve together on a base model.

    A LoRA serves on its own base model only, and under CRMA only if it was trained on this backbone
    or on an ancestor of it.

    Raises:
        BaseMismatch: the task adapter or the backbone was made for another base model.
        LineageMismatch: the backbone that the LoRA was trained on, if any, does not fit `backbone`.
    """
    for entry in (task, backbone):
        if entry is not None:
            entry.check_base(base_digest)
    if task is None or backbone is None:
        return
    trained_on = task.manifest.backbone
    if trained_on is not None and backbone.descends_from(trained_on):
        return
    reason = "was trained without CRMA"
    if trained_on is not None:
        other = f"{backbone.version} ({backbone.digest})"
        reason = f"was trained on backbone {trained_on}, from which {other} does not descend"
    message = f"{task.name}@{task.version} {reason}: use it with CRMA off."
    raise LineageMismatch(message, field="crma", value=True, allowed=False)


def lineage_problem(task: TaskEntry, serving: BackboneEntry | None) -> LineageMismatch | None:
    """Why a task that serves cannot serve as it was trained; None if it can.

    Args:
        task: the version that serves.
        serving: the backbone that serves, if any.
    """
    if task.fits_lineage([] if serving is None else [serving]):
        return None
    trained_on = task.manifest.backbone
    if serving is None:
        allowed = None
        found = "no backbone serves"
    else:
        allowed = [serving.digest, *serving.manifest.lineage]
        found = (
            f"the serving backbone {serving.version} ({serving.digest}) does not descend from it"
        )
    message = (
        f"{task.manifest.place}: this LoRA ({task.digest}) serves, but cannot: "
        f"it was trained on backbone {trained_on}, and {found}."
    )
    return LineageMismatch(message, field="backbone", value=trained_on, allowed=allowed)


def check_change(
    root: Path, before: Channels, after: Channels, published: Entry | None = None
) -> None:
    """Every task that serves after a change can serve, unless it could not before.

    A task that could not serve before the change does not stop it: otherwise a store with two such
    tasks could not be mended one task at a time.

    Args:
        root: of the store.
        before: what serves now.
        after: what would serve. The manifests of versions that begin to serve are known to be
            sound.
        published: a version that begins to serve and is not on the disk yet.

    Raises:
        LineageMismatch: the change would leave a task that cannot serve.
    """
    backbone_moves = before.backbone != after.backbone
    for name, version in after.tasks.items():
        stays = before.tasks.get(name) == version
        if stays and not backbone_moves:
            continue
        task = _task(root, name, version, published)
        if task is None or task.manifest.backbone is None:
            continue
        problem = lineage_problem(task, _backbone(root, after, published))
        if problem is None or (stays and lineage_problem(task, _backbone(root, before))):
            continue
        message = f"Refused, because a task would be left unable to serve: {problem.message}"
        raise LineageMismatch(
            message, field=problem.field, value=problem.value, allowed=problem.allowed
        )


def _task(root: Path, name: str, version: str, published: Entry | None) -> TaskEntry | None:
    """A version of a task; None if its manifest is damaged, which `verification` reports."""
    if isinstance(published, TaskEntry) and (published.name, published.version) == (name, version):
        return published
    try:
        return read_task(root, name, version)
    except StoreError:
        return None


def _backbone(
    root: Path, channels: Channels, published: Entry | None = None
) -> BackboneEntry | None:
    """The backbone that serves; None if there is none or its manifest is damaged."""
    version = channels.backbone
    if version is None:
        return None
    if isinstance(published, BackboneEntry) and published.version == version:
        return published
    try:
        return read_backbone(root, version)
    except StoreError:
        return None
