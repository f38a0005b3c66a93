"""crma.training.screening: which candidate is confirmed, and which rival it has to beat."""

from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.training.experiment import Experiment
from crma.training.screening import Screened, Screening, choose, screened, screening_table

SEEDS = [40, 41]
ROLES = {"one": "candidate", "two": "candidate", "warm": "rival", "plain": "rival", "other": ""}


def experiment() -> Experiment:
    runs = [{"arm": "MODULAR", "label": label, "role": role} for label, role in ROLES.items()]
    return Experiment.model_validate(
        {
            "name": "s",
            "config": {"tasks": ["a"]},
            "runs": [each | {"seeds": SEEDS} for each in runs],
        }
    )


def records(losses: dict[str, float], drifts: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Two seeds of each label, whose prior tasks have a loss together; the last task has 9."""
    made = {}
    for label in ROLES:
        for seed in SEEDS:
            loss = losses.get(label, 1.0) * (1 + (seed - SEEDS[0]) / 100)
            made[f"{label}-seed{seed}"] = {
                "arm": "MODULAR",
                "seed": seed,
                "loss": [[0, 0, 0], [loss / 4, 3 * loss / 4, 9.0]],
                "mean_drift": drifts.get(label, 0.0) + (seed - SEEDS[0]) / 10,
                "pairing": {"seed": seed},
            }
    return made


def taken(losses: dict[str, float], **drifts: float) -> Screening:
    return choose(screened(experiment(), records(losses, drifts)))


def test_the_lowest_loss_of_prior_tasks_wins_among_those_that_stand_still() -> None:
    losses = {"one": 0.8, "two": 0.9, "warm": 0.95, "plain": 1.1}
    assert taken(losses) == Screening("one", "warm")
    assert taken(losses, one=0.46) == Screening("two", "warm")  # its mean is .46 + .05
    assert taken(losses, one=-0.54) == Screening("one", "warm")
    assert taken(losses, one=-0.56) == Screening("two", "warm")
    assert taken(losses, one=2.0, two=-3.0) == Screening(None, "warm")


def test_drift_at_the_limit_is_allowed() -> None:
    at_limit = Screened("one", "candidate", 1.0, 0.5)
    rival = Screened("warm", "rival", 2.0, 0.0)
    assert choose([at_limit, rival]).winner == "one"
    assert choose([at_limit._replace(drift=-0.5), rival]).winner == "one"
    assert choose([at_limit._replace(drift=0.5000001), rival]).winner is None


def test_equal_losses_are_decided_by_name_and_not_by_the_order_of_files() -> None:
    assert taken({"one": 0.9, "two": 0.9, "warm": 0.7, "plain": 0.7}) == Screening("one", "plain")


def test_runs_without_a_role_are_no_part_of_it() -> None:
    found = screened(experiment(), records({"other": 0.1}, {}))
    assert {each.label for each in found} == {"one", "two", "warm", "plain"}


def test_only_seeds_that_all_have_count() -> None:
    made = records({"one": 0.8, "two": 0.9}, {})
    del made["two-seed41"]
    made["one-seed41"]["loss"][-1] = [50.0, 50.0, 0.0]
    assert choose(screened(experiment(), made)).winner == "one"
    assert "when all of its runs are there" in screening_table(experiment(), made)
    for label in ROLES:
        made.pop(f"{label}-seed40")
    with pytest.raises(ConfigError, match="no seed in common"):
        screened(experiment(), made)


def test_runs_that_are_no_pairs_are_refused() -> None:
    made = records({}, {})
    made["warm-seed41"]["pairing"] = {"seed": 41, "machine": "another"}
    with pytest.raises(ConfigError, match="differ in more than the arm"):
        screened(experiment(), made)


def test_a_screening_needs_a_rival() -> None:
    with pytest.raises(ConfigError, match="needs a rival"):
        choose([Screened("one", "candidate", 1.0, 0.0)])


def test_the_table_has_every_trial_against_the_best_rival() -> None:
    text = screening_table(experiment(), records({"one": 0.8, "warm": 0.9}, {"two": 1.0}))
    lines = text.splitlines()
    assert lines[2].startswith("| one | candidate | 2 | +11.11 [")
    assert "| warm | rival | 2 | +0.00 [+0.00, +0.00] |" in text
    assert "| two | candidate | 2 |" in text
    assert text.endswith("Taken: one. The best rival is warm.")
