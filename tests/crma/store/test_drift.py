"""crma.store.drift: how much worse the serving backbone made each task."""

from typing import Any

from crma.store.channels import BACKBONE, Channels, task_channel
from crma.store.drift import promotion_drift

LEGAL, CODE = task_channel("legal"), task_channel("code")


def evidence(weight: float, **drift: float) -> dict[str, Any]:
    """Evidence as `crma store promote` records it: of a blend that harms, and of the one chosen."""
    tasks = {
        name: {"loss": 1.0, "drift": percent, "change": None} for name, percent in drift.items()
    }
    harmed = {name: {"loss": 9.0, "drift": 900.0, "change": None} for name in drift}
    tried = [
        {"lambda": 1.0, "harmed": list(drift), "tasks": harmed},
        {"lambda": weight, "harmed": [], "tasks": tasks},
    ]
    return {"lambda": weight, "tried": tried}


def served() -> Channels:
    """Two tasks on backbone v1."""
    return Channels().serve(BACKBONE, "v1").serve(LEGAL, "v1").serve(CODE, "v1")


def test_the_drift_is_that_of_the_blend_which_serves() -> None:
    channels = served().serve(BACKBONE, "v2", evidence(0.25, legal=1.5, code=-0.5))
    assert promotion_drift(channels) == {"legal": 0.015, "code": -0.005}


def test_a_newcomer_of_the_promotion_has_its_drift() -> None:
    channels = served().serve(BACKBONE, "v2", evidence(0.25, legal=1.0, new=6.0))
    channels = channels.serve(task_channel("new"), "v1")
    assert promotion_drift(channels) == {"legal": 0.01, "new": 0.06}


def test_a_task_that_was_published_again_or_stopped_has_none() -> None:
    channels = served().serve(BACKBONE, "v2", evidence(0.25, legal=3.0, code=1.0))
    assert promotion_drift(channels.serve(LEGAL, "v2")) == {"code": 0.01}
    assert promotion_drift(channels.serve(CODE, None)) == {"legal": 0.03}


def test_rolling_the_backbone_back_ends_it() -> None:
    promoted = served().serve(BACKBONE, "v2", evidence(0.25, legal=3.0))
    assert promotion_drift(promoted.roll_back(BACKBONE)) == {}
    again = promoted.serve(BACKBONE, "v3", evidence(0.5, legal=4.0))
    assert promotion_drift(again) == {"legal": 0.04}
    assert promotion_drift(again.roll_back(BACKBONE)) == {"legal": 0.03}


def test_evidence_in_another_form_counts_as_none() -> None:
    for odd in ({"lambda": 1.0}, {"lambda": 1.0, "tried": [1, {"lambda": 1.0, "tasks": 3}]}):
        assert promotion_drift(served().serve(BACKBONE, "v2", odd)) == {}


def test_evidence_that_cannot_be_of_a_task_does_not_keep_the_store_from_being_read() -> None:
    """A number that no float holds ended the look at the store, and a name that is none did."""
    odd = evidence(0.25, legal=10**400)
    odd["tried"][1]["tasks"]["../x"] = {"drift": 1.0}
    odd["tried"][1]["tasks"]["code"] = {"drift": 2.0}
    assert promotion_drift(served().serve(BACKBONE, "v2", odd)) == {"code": 0.02}
