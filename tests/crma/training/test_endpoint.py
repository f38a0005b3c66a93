"""crma.training.endpoint: the pre-registered figure, its tests in their order, and what is refused.

The numbers are compared with scipy's tests of the same values.
"""

from pathlib import Path
from typing import Any

import pytest
from paths import EXPERIMENTS
from scipy import stats

from crma.core.digests import file_digest
from crma.core.errors import ConfigError
from crma.training.endpoint import (
    Endpoint,
    advantage,
    drift_of,
    endpoint_table,
    order_of,
    prior_loss,
    read_endpoint,
    verdict,
)
from crma.training.experiment import read_experiment

ORDERS = (("a", "b", "c"), ("b", "c", "a"))
SEEDS = (4, 5, 6, 7)
ENDPOINT = Endpoint(
    name="small",
    arm="MODULAR",
    against=("MODULAR-stop", "PRIVATE", "FROZEN-matched"),
    measure="holdout",
    seeds=SEEDS,
    orders=ORDERS,
    alpha=0.05,
    drift_margin=0.5,
    worst_drift=1.0,
    digest="sha256:here",
)


def record(arm: str, seed: int, loss: float, drift: float = 0.0) -> dict[str, Any]:
    """A record whose two prior tasks have a loss together."""
    order = list(order_of(seed, ORDERS))
    return {
        "arm": arm,
        "seed": seed,
        "order": order,
        "config": {"measure": "holdout"},
        "endpoint": "sha256:here",
        "loss": [[None] * 3, [0.1, None, None], [None] * 3, [loss / 4, 3 * loss / 4, 99.0]],
        "drift": [drift, drift / 2, 0.0],
        "mean_drift": 0.75 * drift,
        "pairing": {"seed": seed, "order": order, "dtype": "bfloat16"},
    }


# The advantage over each arm, in percent, by seed.
OVER = {
    "MODULAR-stop": (2.0, 3.0, 2.5, 3.5),
    "PRIVATE": (1.0, -1.0, 0.5, -0.2),
    "FROZEN-matched": (9.0, 9.5, 10.0, 8.5),
}
DRIFTS = (0.1, -0.2, 0.2, 0.0)


def records() -> list[dict[str, Any]]:
    made = []
    for seed, drift in zip(SEEDS, DRIFTS, strict=True):
        made.append(record("MODULAR", seed, 0.8, drift))
    for arm, values in OVER.items():
        for seed, value in zip(SEEDS, values, strict=True):
            made.append(record(arm, seed, 0.8 / (1 - value / 100)))
    return made


def test_the_figure_is_the_loss_of_prior_tasks_only() -> None:
    one, other = record("MODULAR", 4, 0.8), record("PRIVATE", 4, 1.0)
    assert prior_loss(one) == pytest.approx(0.8)  # the last task's 99 is left out
    assert advantage(one, other) == pytest.approx(20)
    assert advantage(other, one) == pytest.approx(-25)


def test_the_tests_are_those_of_scipy_and_stop_at_the_first_that_is_not_won() -> None:
    found = verdict(ENDPOINT, records())
    assert [each.against for each in found] == list(OVER)
    for each in found:
        values = OVER[each.against]
        assert list(each.by_seed.values()) == pytest.approx(values)
        expected = stats.ttest_1samp(values, 0)
        assert each.p == pytest.approx(expected.pvalue)
        assert each.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    # FROZEN-matched is beaten clearly (p < .001), and yet not claimed: PRIVATE is not.
    assert [each.claimed for each in found] == [True, False, False]
    assert found[2].p < 0.001


def test_a_loss_is_not_claimed_as_a_win_however_clear_it_is() -> None:
    made = records()
    for each in made:
        if each["arm"] == "MODULAR":
            each["loss"][-1] = [value * 1.2 for value in each["loss"][-1]]
    first = verdict(ENDPOINT, made)[0]
    assert first.p < 0.05
    assert first.mean < 0
    assert not first.claimed


def test_drift_is_equivalent_to_none_by_two_one_sided_tests() -> None:
    drift = drift_of(ENDPOINT, records())
    means = [0.75 * value for value in DRIFTS]
    above = stats.ttest_1samp(means, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(means, 0.5, alternative="less").pvalue
    assert drift.tost == pytest.approx(max(above, below))
    assert list(drift.by_seed.values()) == pytest.approx(means)
    # Orders: a b c at seeds 4 and 6, b c a at 5 and 7; the first of an order drifts most.
    assert (drift.worst_task, drift.worst) == ("a", pytest.approx((0.1 + 0.2) / 2))
    assert drift.is_small


def test_one_task_that_drifts_too_far_is_not_small() -> None:
    made = records()
    for each in made:
        if each["arm"] == "MODULAR":
            each["drift"][1] = 1.2  # at seeds 4 and 6 this is b's, at 5 and 7 c's
    drift = drift_of(ENDPOINT, made)
    assert drift.tost < 0.05
    assert (drift.worst_task, drift.worst, drift.is_small) == ("c", pytest.approx(1.2), False)


def test_nobody_looks_before_every_run_is_there() -> None:
    made = records()[:-1]
    text = endpoint_table(ENDPOINT, made)
    assert text == "Endpoint small: 1 runs are missing, first FROZEN-matched 7."
    with pytest.raises(ConfigError, match="1 runs of the endpoint small are missing"):
        verdict(ENDPOINT, made)
    assert "| MODULAR-stop | 4 | +2.75 [" in endpoint_table(ENDPOINT, records())
    assert endpoint_table(ENDPOINT, records()).endswith("Within the margins.")


NOT_OF_IT = {
    "endpoint": {"endpoint": "sha256:other"},
    "measure": {"config": {"measure": "validation"}},
    "order": {"order": ["c", "b", "a"]},
}


@pytest.mark.parametrize("field", NOT_OF_IT)
def test_a_record_that_is_not_of_the_endpoint_is_refused(field: str) -> None:
    made = records()
    made[-1] = made[-1] | NOT_OF_IT[field]
    with pytest.raises(ConfigError, match="is not one of the endpoint small") as caught:
        verdict(ENDPOINT, made)
    assert caught.value.field == field


def test_records_that_are_not_paired_are_refused() -> None:
    made = records()
    made[-1]["pairing"] = made[-1]["pairing"] | {"dtype": "float32"}
    with pytest.raises(ConfigError, match="differ in more than the arm") as caught:
        verdict(ENDPOINT, made)
    assert caught.value.field == "dtype"


def test_the_committed_endpoint_is_a_latin_square_of_fresh_seeds(tmp_path: Path) -> None:
    path = EXPERIMENTS / "endpoint.toml"
    endpoint = read_endpoint(path)
    assert endpoint.digest == file_digest(path)
    assert endpoint.seeds == tuple(range(100, 124))
    for place in zip(*endpoint.orders, strict=True):
        assert len(set(place)) == 4  # no task has a place twice
    per_order = [[s for s in endpoint.seeds if s % 4 == number] for number in range(4)]
    assert [len(seeds) for seeds in per_order] == [6, 6, 6, 6]
    (tmp_path / "odd.toml").write_text(path.read_text() + '\ndigest = "mine"\n')
    with pytest.raises(ConfigError, match="computed from the file"):
        read_endpoint(tmp_path / "odd.toml")


def test_the_confirmation_plans_what_the_endpoint_judges() -> None:
    experiment = read_experiment(EXPERIMENTS / "confirm.toml")
    endpoint = experiment.judged_by()
    assert endpoint is not None
    assert experiment.orders == endpoint.orders
    assert endpoint.arm == "MODULAR"  # until a screening has taken another one
    planned = {(config.arm, config.seed) for config in experiment.planned().values()}
    judged = (endpoint.arm, *endpoint.against)
    beside = ("M=I", "free-M", "FROZEN-warm-last")
    assert planned == {(arm, seed) for arm in (*judged, *beside) for seed in endpoint.seeds}
    for config in experiment.planned().values():
        assert config.tasks == order_of(config.seed, endpoint.orders)
        assert (config.measure, config.dtype) == (endpoint.measure, "bfloat16")
