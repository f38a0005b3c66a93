"""Against published values, scipy's own tests, and what the intervals promise."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from crma.core.errors import ConfigError
from crma.evaluation import statistics

PUBLISHED = [
    (98, 100, 0.930, 0.994),
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
    (0, 20, 0.0, 0.1611),  # the same table
    (1, 29, 0.0061, 0.1718),  # the same table
]


@pytest.mark.parametrize(("correct", "scored", "low", "high"), PUBLISHED)
def test_wilson_gives_published_values(correct: int, scored: int, low: float, high: float) -> None:
    assert statistics.wilson(correct, scored) == pytest.approx((low, high), abs=6e-4)


def test_mcnemar_is_exact() -> None:
    two_tails = {
        (69, 1): 2 * 71 / 2**70,
        (5, 1): 14 / 64,
        (0, 4): 2 / 16,
        (0, 0): 1.0,
    }  # of Binomial(gained + lost, ½)
    found = {counts: statistics.mcnemar(*counts) for counts in two_tails}
    assert found == pytest.approx(two_tails, rel=1e-9)


def test_holm_gives_published_values() -> None:
    adjusted = {
        (0.01, 0.04, 0.03, 0.005): [0.03, 0.06, 0.06, 0.02],
        (0.6, 0.7): [1, 1],
        (0.2,): [0.2],
        (): [],
    }
    assert {ps: statistics.holm(ps) for ps in adjusted} == {
        ps: pytest.approx(p) for ps, p in adjusted.items()
    }


@pytest.mark.parametrize(("flipped", "n"), [(0, 40), (30, 100), (5, 100), (400, 2000)])
def test_the_detectable_difference_is_found_in_80_of_100_simulated_runs_and_a_smaller_one_is_not(
    flipped: int, n: int
) -> None:
    difference, rng = statistics.detectable_difference(flipped, n), np.random.default_rng(0)
    assert difference is not None
    found = []
    for true in (difference, 0.8 * difference):
        flips = max(flipped / n, true)
        gained, lost, _ = rng.multinomial(
            n, [(flips + true) / 2, (flips - true) / 2, 1 - flips], size=20_000
        ).T
        pairs = {(int(g), int(b)) for g, b in zip(gained, lost, strict=True)}
        p = {pair: statistics.mcnemar(*pair) for pair in pairs}
        found.append(
            np.mean([p[int(g), int(b)] <= 0.05 for g, b in zip(gained, lost, strict=True)])
        )
    assert found[0] == pytest.approx(0.8, abs=0.015)
    assert found[1] < 0.75


def test_too_few_items_detect_nothing_and_a_means_detectable_difference_is_the_textbooks() -> None:
    assert [statistics.detectable_difference(0, n) is None for n in (1, 5, 6)] == [
        True,
        True,
        False,
    ]  # 2 / 2^6 < .05
    assert statistics.detectable_mean([-1, 1] * 50) == pytest.approx(
        (1.96 + 0.8416) / math.sqrt(99), rel=1e-3
    )


def test_bootstrap_of_two_items_is_the_law_known_by_hand_and_of_many_differs_between_seeds() -> (
    None
):
    # Means of resamples of (0, 1): 0 with probability 1/4, 1/2 with 1/2, 1 with 1/4.
    assert statistics.paired_bootstrap([0, 1], seed=0, confidence=0.95) == (0.0, 1.0)
    assert statistics.paired_bootstrap([0, 1], seed=0, confidence=0.40) == (0.5, 0.5)
    many = np.random.default_rng(0).normal(size=50).tolist()
    assert statistics.paired_bootstrap(many, seed=0) != statistics.paired_bootstrap(many, seed=1)


def test_bootstrap_agrees_with_scipys_on_continuous_differences() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1.4, 80)
    theirs = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=10_000, rng=2
    )
    ours = statistics.paired_bootstrap(differences.tolist(), seed=3)
    assert ours == pytest.approx(
        tuple(theirs.confidence_interval), abs=0.02
    )  # the interval is 0.6 wide
    assert (
        statistics.paired_bootstrap(sorted(differences), seed=3) == ours
    )  # the order of the items says nothing


def test_what_is_too_few_not_finite_or_no_margin_is_refused() -> None:
    for values in ([1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ConfigError, match="at least two finite"):
            statistics.paired_bootstrap(values, seed=0)
    for margin in (0.0, math.nan):
        with pytest.raises(ConfigError, match="margin"):
            statistics.paired_equivalence([0, 1], margin=margin, seed=0)


def test_the_interval_of_a_mean_and_its_equivalence_are_the_published_ones() -> None:
    values = [
        float(x) for x in range(1, 6)
    ]  # mean 3, standard error sqrt(0.5); t(4) at 97.5 % is 2.776445
    half = 2.776445 * math.sqrt(0.5)
    assert statistics.t_interval(values) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    centred = [value - 3 for value in values]  # t = margin / error; P(t(4) > 2.131847) is 5 %
    assert statistics.tost(centred, margin=2.131847 * math.sqrt(0.5)) == pytest.approx(
        0.05, rel=1e-5
    )
    assert statistics.tost([value + 1 for value in centred], margin=1.0) == pytest.approx(0.5)
    assert statistics.t_interval([2, 2]) == (2, 2)
    assert (statistics.tost([0, 0], margin=1), statistics.tost([2, 2], margin=1)) == (0, 1)


PAIRS = [
    ([0] * 149, True),
    ([0] * 148, None),  # 0.98^148 > 5 %: too few items for silence to mean anything
    ([1] * 69 + [-1] + [0] * 30, False),
    ([1] * 5 + [-1] * 5 + [0] * 990, True),  # flips that cancel, few enough
    (
        [1] * 62 + [-1] * 62 + [0] * 876,
        True,
    ),  # the 95 % interval would be ±0.022: it is the 90 % one
    ([1] * 250 + [-1] * 250 + [0] * 500, False),  # the same difference, too noisy to tell
]


@pytest.mark.parametrize(("differences", "expected"), PAIRS)
def test_equivalence_needs_the_interval_inside_the_margin_and_enough_items(
    differences: Any, expected: Any
) -> None:
    assert statistics.paired_equivalence(differences, margin=0.02, seed=0) is expected
