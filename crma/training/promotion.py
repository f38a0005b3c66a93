"""Lets a candidate serve if the gate finds that no task suffers (docs/method.md, section 5).

A candidate is a published backbone that descends from the serving one and does not serve yet.
"""

from collections.abc import Collection, Mapping
from typing import Any

from crma.core.errors import ConfigError, CrmaError, LineageMismatch
from crma.core.provenance import commit, hardware
from crma.evaluation.offline import Note, Served
from crma.method.backbone import Backbone
from crma.store.channels import BACKBONE, Channels, task_channel
from crma.store.entry import BackboneEntry, TaskEntry, read_backbone
from crma.store.manifest import Blend
from crma.store.publication import backbone_digest
from crma.training.gate import SLACK, Gate, blend
from crma.training.gated_task import (
    GatedTask,
    backbone_of_record,
    conditions,
    was_measured_here,
)


def promote(
    served: Served,
    version: str,
    *,
    margin: float = 0.01,
    newcomer_margin: float = 0.1,
    allow_ungated: Collection[str] = (),
    dry_run: bool = False,
    note: Note,
) -> dict[str, Any]:
    """Let a candidate serve, whole or as a blend, with the tasks trained on the way to it.

    If no blend passes, the serving backbone stays. Either way `channels.json` records the evidence,
    unless this is a dry run. If an error is raised, nothing has changed.

    Args:
        served: the base model, and the store that holds the candidate.
        version: the candidate's version.
        margin: the share of its loss by which a serving task may get worse.
        newcomer_margin: the same for a newcomer, a task that nobody uses yet. A newcomer
            was trained under the whole candidate, so almost every blend costs it something.
        allow_ungated: names of tasks that need not be scored.
        dry_run: decide, and change nothing.
        note: called with one line about every trial, and about every task in it.

    Returns:
        The evidence: {"candidate", "serving", "margins", "slack", "limits" (as `Gate.limits`, by
        task), "lambda" (0: the serving backbone stays), "tried", "ungated": {task: reason},
        "dtype", "hardware", "commit"}.

    Raises:
        ConfigError: the candidate already serves, or a task outside `allow_ungated` has no
            validation data.
        LineageMismatch: the candidate does not descend from the serving backbone, so the serving
            tasks could no longer serve.
        StoreError: something else began to serve meanwhile.
    """
    store = served.store
    channels = store.channels()
    serving = store.backbone()
    candidate = read_backbone(store.root, version)
    _check_candidate(candidate, serving, served.base.digest)
    newcomers = store.newcomers(candidate)
    entries = {name: store.task(name) for name in channels.tasks}
    entries |= {entry.name: entry for entry in newcomers}
    margins = {name: margin if name in channels.tasks else newcomer_margin for name in entries}
    tasks, ungated = _gated_tasks(served, entries, allow_ungated)
    gate = _make_gate(served, serving, candidate, tasks, margins, newcomers, note)
    weight, tried = gate.search()
    evidence = {
        "candidate": candidate.digest,
        "serving": serving.digest if serving else None,
        "margins": margins,
        "slack": SLACK,
        "limits": {name: limit.record() for name, limit in gate.limits.items()},
        "lambda": weight,
        "tried": tried,
        "ungated": ungated,
        "dtype": str(served.dtype).removeprefix("torch."),
        "hardware": hardware(),
        "commit": commit(),
    }
    if not dry_run:
        _serve(served, weight, serving, candidate, newcomers, evidence, since=channels)
    return evidence


def _make_gate(
    served: Served,
    serving: BackboneEntry | None,
    candidate: BackboneEntry,
    tasks: list[GatedTask],
    margins: Mapping[str, float],
    newcomers: Collection[TaskEntry],
    note: Note,
) -> Gate:
    """Load the backbones that the tasks are scored under."""
    old = None if serving is None else serving.load()
    new = candidate.load()
    loaded = {candidate.digest: new}
    if serving is not None and old is not None:
        loaded[serving.digest] = old
    return Gate(
        served=served,
        old=old,
        new=new,
        tasks=tasks,
        margins=margins,
        newcomers={entry.name for entry in newcomers},
        of_record=_backbones_of_record(served, tasks, loaded),
        note=note,
    )


def _backbones_of_record(
    served: Served, tasks: Collection[GatedTask], loaded: dict[str, Backbone]
) -> dict[str, Backbone]:
    """For each task whose loss was recorded elsewhere, the backbone it was recorded under.

    Args:
        served: the store that holds the backbones. A task whose backbone it does not hold is left
            out.
        tasks: the tasks to score.
        loaded: digest -> backbones that are loaded already; others are added.
    """
    here = conditions(served.dtype, None)
    of_record = {}
    for task in tasks:
        if was_measured_here(task.entry, here):
            continue
        entry = backbone_of_record(served.store, task.entry)
        if entry is None:
            continue
        if entry.digest not in loaded:
            loaded[entry.digest] = entry.load()
        of_record[task.entry.name] = loaded[entry.digest]
    return of_record


def _check_candidate(
    candidate: BackboneEntry, serving: BackboneEntry | None, base_digest: str
) -> None:
    """Raise BaseMismatch, ConfigError or LineageMismatch if the candidate must not serve."""
    candidate.check_base(base_digest)
    if serving is None:
        return
    if serving.digest == candidate.digest:
        message = "this backbone serves already"
        raise ConfigError(
            message, field="candidate", value=candidate.version, allowed="another version"
        )
    if not candidate.descends_from(serving.digest):
        message = (
            "it does not descend from the serving backbone, so the serving tasks could not use it; "
            "train it with `start`"
        )
        raise LineageMismatch(
            message, field="candidate", value=candidate.digest, allowed=serving.digest
        )


def _gated_tasks(
    served: Served, entries: Mapping[str, TaskEntry], allow_ungated: Collection[str]
) -> tuple[list[GatedTask], dict[str, str]]:
    """Divide the tasks into those that can be scored and those that cannot.

    A task that was trained without a backbone is in neither group: it never serves with CRMA on, so
    no backbone can harm it.

    Returns:
        The tasks to score, and for each of the others the reason why it cannot be scored.

    Raises:
        ConfigError: a task that cannot be scored is not in `allow_ungated`.
    """
    tasks: list[GatedTask] = []
    ungated: dict[str, str] = {}
    for name, entry in sorted(entries.items()):
        if entry.manifest.backbone is None:
            continue
        try:
            tasks.append(GatedTask.of(served, entry))
        except CrmaError as error:
            ungated[name] = str(error)
    refused = sorted(set(ungated) - set(allow_ungated))
    if refused:
        name = refused[0]
        message = (
            f"{name} cannot be scored: {ungated[name]}; to promote without it: --allow-ungated NAME"
        )
        scored = [task.entry.name for task in tasks]
        raise ConfigError(message, field="task", value=refused, allowed=scored)
    return tasks, ungated


def _serve(
    served: Served,
    weight: float,
    serving: BackboneEntry | None,
    candidate: BackboneEntry,
    newcomers: Collection[TaskEntry],
    evidence: Mapping[str, Any],
    *,
    since: Channels,
) -> None:
    """Move the channels as decided, in one write that also records the evidence."""
    moves: dict[str, str | None] = {}
    if weight:
        moves[BACKBONE] = candidate.version
        if serving is not None and weight < 1:
            moves[BACKBONE] = _publish_blend(served, serving, candidate, weight)
        for entry in newcomers:
            moves[task_channel(entry.name)] = entry.version
    served.store.set_serving(moves, evidence=evidence, since=since)


def _publish_blend(served: Served, old: BackboneEntry, new: BackboneEntry, weight: float) -> str:
    """Publish the backbone between two others. Returns its version.

    A promotion that was killed may have published it already; that version is then used again.
    """
    made = blend(old.load(), new.load(), weight)
    published = served.store.find_backbone(backbone_digest(made))
    if published is not None:
        return published.version
    ancestors = dict.fromkeys((old.digest, new.digest, *new.manifest.lineage))
    record = Blend.model_validate({"parents": (old.digest, new.digest), "lambda": weight})
    entry = served.store.publish_backbone(
        made,
        lineage=list(ancestors),
        blend=record,
        serve=False,
        base=served.base,
        trained_on=None,
        measured={},
        licence=new.manifest.licence,
    )
    return entry.version
