"""Publishes a finished run in an adapter store."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from crma.core.errors import ConfigError
from crma.data.splits import load_split
from crma.store.adapter_store import AdapterStore
from crma.store.channels import BACKBONE, task_channel
from crma.store.entry import BackboneEntry, TaskEntry
from crma.store.publication import Origin
from crma.training.arms import ARMS, Arm
from crma.training.config import task_name
from crma.training.gated_task import conditions
from crma.training.protocol import Run
from crma.training.snapshots import LICENCE


class Shipment(NamedTuple):
    """What `ship` did.

    Attributes:
        candidate: the backbone that waits for `crma store promote`; None if everything serves.
        existing: channel -> the version of it that was published before.
    """

    candidate: BackboneEntry | None
    existing: dict[str, str]


def check_shippable(arm: Arm) -> None:
    """Raise ConfigError if no store can serve what this arm trains. Call it before a run."""
    reason = ""
    if arm.joint:
        reason = "no per-task adapters to ship: it trains one LoRA on all tasks together"
    elif arm.private:
        reason = "a backbone for each task, and a store serves one to all"
    if reason:
        message = f"a run of the arm {arm.name} has {reason}"
        allowed = [name for name, other in ARMS.items() if not (other.joint or other.private)]
        raise ConfigError(message, field="arm", value=arm.name, allowed=allowed)


def ship(run: Run, target: AdapterStore) -> Shipment:
    """Publish the last backbone of a finished run, and every LoRA with its measures under it.

    Everything serves at once, unless another backbone serves in the store. Then nothing that serves
    changes, and the new backbone is a candidate for `crma store promote`. What an earlier call
    published is not published again.

    Args:
        run: a run that has finished `execute`.
        target: the store to publish into.

    Raises:
        ConfigError: as `check_shippable`.
        StoreError: an adapter does not fit the store.
    """
    check_shippable(run.arm)
    num_tasks = len(run.config.tasks)
    # The gate compares later losses with these, and it computes as the server does.
    run.model.set_attn_implementation(run.serving_attention)
    existing: dict[str, str] = {}
    candidate = _ship_backbone(run, target, existing) if run.arm.crma else None
    for t in range(num_tasks):
        run.progress("measuring the shipped adapters", t, num_tasks)
        _ship_task(run, target, t, existing, serve=candidate is None)
    return Shipment(candidate, existing)


def _ship_backbone(
    run: Run, target: AdapterStore, existing: dict[str, str]
) -> BackboneEntry | None:
    """Publish the last backbone, unless the store holds it. Returns it if it is a candidate."""
    last = run.snapshots.backbone_after(len(run.snapshots.stages))
    serving = target.backbone()
    found = target.find_backbone(last.digest)
    if found is not None:
        existing[BACKBONE] = found.version
        return _let_serve(target, found, serving)
    published = target.publish_backbone(
        last.load(),
        lineage=last.manifest.lineage,
        serve=serving is None,
        **_origin(run, last, measured={}),
    )
    return None if serving is None else published


def _let_serve(
    target: AdapterStore, published: BackboneEntry, serving: BackboneEntry | None
) -> BackboneEntry | None:
    """A backbone that is in the store serves if nothing does. Returns it if it is a candidate."""
    if serving is None:  # an earlier call was killed before it served
        target.set_serving({BACKBONE: published.version})
        return None
    return None if serving.digest == published.digest else published


def _ship_task(
    run: Run, target: AdapterStore, t: int, existing: dict[str, str], *, serve: bool
) -> None:
    """Measure task t under the last backbone and publish its LoRA, unless the store holds it."""
    task = run.config.tasks[t]
    snapshots = run.snapshots
    entry = snapshots.store.task(task_name(task))
    for version in target.task_versions(entry.name):
        published = target.task(entry.name, version)
        if published.digest == entry.digest:
            channel = task_channel(entry.name)
            existing[channel] = version
            if serve and entry.name not in target.task_names():
                target.set_serving({channel: version})
            return
    num_stages = len(snapshots.stages)
    adapters = snapshots.adapters_after(num_stages, t)
    plan = adapters.plan(run.device, run.model.dtype)
    backbone = None if adapters.backbone is None else adapters.backbone.digest
    measured: dict[str, Any] = {"conditions": conditions(run.model.dtype, backbone)}
    for split in ("validation", "holdout"):
        rows = run.evaluator.encode(load_split(task, split))
        measured[split] = asdict(run.evaluator.measure(plan, rows))
    target.publish_task(
        entry.name,
        entry.load(),
        backbone=entry.manifest.backbone,
        prompt_format=entry.prompt_format,
        serve=serve,
        **_origin(run, entry, measured),
    )


def _origin(run: Run, entry: TaskEntry | BackboneEntry, measured: Mapping[str, Any]) -> Origin:
    return {
        "base": run.base,
        "trained_on": entry.manifest.trained_on,
        "measured": measured,
        "licence": LICENCE,
    }
