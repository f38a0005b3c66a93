"""How much worse the serving backbone made each task, as its promotion measured it."""

from collections.abc import Mapping
from typing import Any

from crma.store.channels import BACKBONE, Channels, task_channel

MAX_PERCENT = 1e9  # beyond any measure; an integer of JSON may be more than a float holds


def promotion_drift(channels: Channels) -> dict[str, float]:
    """The growth of each task's validation loss since its publication: 0.02 is 2 % worse.

    The evidence with which the serving backbone began to serve has it. There is none for a task
    that was not scored, nor for one whose version was replaced afterwards.
    """
    drift: dict[str, float] = {}
    for change in channels.history:
        if change.channel == BACKBONE and change.after == channels.backbone:
            if change.action == "serve":
                drift = _measured(change.evidence or {})
        elif change.before is not None:  # else it began to serve in that promotion
            drift.pop(change.channel, None)
    by_name = {name: drift.get(task_channel(name)) for name in channels.tasks}
    return {name: ratio for name, ratio in by_name.items() if ratio is not None}


def _measured(evidence: Mapping[str, Any]) -> dict[str, float]:
    """The drift of each task under the blend that was chosen, by channel."""
    chosen = evidence.get("lambda")
    trials = evidence.get("tried")
    if not isinstance(trials, list):
        return {}
    for trial in trials:
        if isinstance(trial, dict) and trial.get("lambda") == chosen:
            scores = trial.get("tasks")
            return _ratios(scores) if isinstance(scores, dict) else {}
    return {}


def _ratios(scores: Mapping[str, Any]) -> dict[str, float]:
    """Percentages of the evidence as ratios, by channel; what cannot be one is left out.

    Evidence may be any JSON, so nothing in it may keep a store from being read.
    """
    ratios = {}
    for name, score in scores.items():
        percent = score.get("drift") if isinstance(score, dict) else None
        if isinstance(percent, int | float) and abs(percent) <= MAX_PERCENT:
            ratios[f"tasks/{name}"] = percent / 100  # perhaps no valid name, and then no task's
    return ratios
