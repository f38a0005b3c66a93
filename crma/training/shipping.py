"""Publishes a finished run in an adapter store."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from crma.data.splits import load_split
from crma.store.adapter_store import AdapterStore, Origin
from crma.store.entry import BackboneEntry, TaskEntry
from crma.training.config import task_name
from crma.training.protocol import Run
from crma.training.snapshots import LICENCE


def ship(run: Run, target: AdapterStore) -> BackboneEntry | None:
    """Publish the last backbone of a finished run, and every LoRA with its measures under it.

    Everything serves at once, unless another backbone serves in the store. Then nothing that serves
    changes, and the new backbone is a candidate for `crma promote`.

    Args:
        run: a run that has finished `execute`.
        target: the store to publish into.

    Returns:
        The candidate; None if everything serves.
    """
    num_tasks = len(run.config.tasks)
    # The gate compares later losses with these, and it computes as the server does.
    run.model.set_attn_implementation(run.serving_attention)
    candidate = _ship_backbone(run, target) if run.arm.crma else None
    for t in range(num_tasks):
        run.progress("measuring the shipped adapters", t, num_tasks)
        _ship_task(run, target, t, serve=candidate is None)
    return candidate


def _ship_backbone(run: Run, target: AdapterStore) -> BackboneEntry | None:
    """Publish the last backbone, unless it serves already. Returns it if it is a candidate."""
    last = run.snapshots.backbone_after(len(run.snapshots.stages))
    serving = target.backbone()
    if serving is not None and serving.digest == last.digest:
        return None
    published = target.publish_backbone(
        last.load(),
        lineage=last.manifest.lineage,
        serve=serving is None,
        **_origin(run, last, measured={}),
    )
    return None if serving is None else published


def _ship_task(run: Run, target: AdapterStore, t: int, *, serve: bool) -> None:
    """Measure task t under the last backbone and publish its LoRA."""
    task = run.config.tasks[t]
    snapshots = run.snapshots
    entry = snapshots.store.task(task_name(task))
    num_stages = len(snapshots.stages)
    plan = snapshots.plan_after(num_stages, t, run.device, run.model.dtype)
    measured = {}
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
