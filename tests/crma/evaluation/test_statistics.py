"""crma.evaluation.statistics: published values, scipy's own functions, and simulated coverage."""

import math
import tracemalloc
from bisect import bisect_right
from functools import cache
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
    # The two tails of Binomial(gained + lost, ½).
    two_tails = {(69, 1): 2 * 71 / 2**70, (5, 1): 14 / 64, (0, 4): 2 / 16, (0, 0): 1.0}
    found = {counts: statistics.mcnemar(*counts) for counts in two_tails}
    assert found == pytest.approx(two_tails, rel=1e-9)


def test_holm_gives_published_values() -> None:
    adjusted = {
        (0.01, 0.04, 0.03, 0.005): [0.03, 0.06, 0.06, 0.02],
        (0.6, 0.7): [1, 1],
        (0.2,): [0.2],
        (): [],
    }
    for p_values, expected in adjusted.items():
        assert statistics.holm(p_values) == pytest.approx(expected)


@cache
def critical(num_flips: int) -> int:
    """Return the most flips one way that mcnemar still finds significant; -1 if it finds none.

    p grows with the smaller of the two counts, so the bound is found by bisection.
    """

    def p(one_way: int) -> float:
        return statistics.mcnemar(one_way, num_flips - one_way)

    return bisect_right(range(num_flips // 2 + 1), 0.05, key=p) - 1


def simulated_power(difference: float, flipped: int, n: int) -> float:
    """Return how often mcnemar finds a true difference in 20,000 simulated runs of n items."""
    flips = max(flipped / n, difference)
    shares = [(flips + difference) / 2, (flips - difference) / 2, 1 - flips]
    runs = np.random.default_rng(0).multinomial(n, shares, size=20_000)
    found = [min(gained, lost) <= critical(int(gained + lost)) for gained, lost, _ in runs]
    return float(np.mean(found))


@pytest.mark.parametrize(("flipped", "n"), [(0, 40), (30, 100), (5, 100), (400, 2000)])
def test_the_detectable_difference_is_found_in_80_of_100_simulated_runs_and_a_smaller_one_is_not(
    flipped: int, n: int
) -> None:
    difference = statistics.detectable_difference(flipped, n)
    assert difference is not None
    assert simulated_power(difference, flipped, n) == pytest.approx(0.8, abs=0.015)
    assert simulated_power(0.8 * difference, flipped, n) < 0.75


def test_too_few_items_detect_no_difference_at_all() -> None:
    assert statistics.detectable_difference(0, 1) is None
    assert statistics.detectable_difference(0, 5) is None
    assert statistics.detectable_difference(0, 6) is not None  # 2 / 2^6 < .05


def test_the_detectable_mean_is_the_textbook_one() -> None:
    textbook = (1.96 + 0.8416) / math.sqrt(99)
    assert statistics.detectable_mean([-1, 1] * 50) == pytest.approx(textbook, rel=1e-3)


def test_the_bootstrap_of_two_items_follows_the_distribution_known_by_hand() -> None:
    # Means of resamples of (0, 1): 0 with probability 1/4, 1/2 with 1/2, 1 with 1/4.
    assert statistics.paired_bootstrap([0, 1], seed=0, confidence=0.95) == (0.0, 1.0)
    assert statistics.paired_bootstrap([0, 1], seed=0, confidence=0.40) == (0.5, 0.5)


def test_the_bootstrap_depends_on_its_seed() -> None:
    many = np.random.default_rng(0).normal(size=50).tolist()
    assert statistics.paired_bootstrap(many, seed=0) != statistics.paired_bootstrap(many, seed=1)


def test_the_bootstrap_draws_in_blocks_whose_size_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All draws at once took 1.6 GB for 10,000 items."""
    differences = np.random.default_rng(0).normal(size=300).tolist()
    intervals = []
    for numbers in (1, 48 * 300, 300 * statistics.RESAMPLES):
        monkeypatch.setattr(statistics, "BLOCK_NUMBERS", numbers)
        intervals.append(statistics.paired_bootstrap(differences, seed=3))
    assert len(set(intervals)) == 1
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", 100_000)
    tracemalloc.start()
    assert statistics.paired_bootstrap(differences, seed=3) == intervals[0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6, "counts, and once more as floats: 1.6 MB"


def test_the_bootstrap_agrees_with_scipys_on_continuous_differences() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1.4, 80)
    theirs = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=10_000, rng=2
    )
    ours = statistics.paired_bootstrap(differences.tolist(), seed=3)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)  # it is 0.6 wide


def test_the_bootstrap_does_not_depend_on_the_order_of_the_items() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1.4, 80).tolist()
    ours = statistics.paired_bootstrap(differences, seed=3)
    assert statistics.paired_bootstrap(sorted(differences), seed=3) == ours


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_the_bootstrap_refuses_too_few_values_and_values_that_are_not_finite(values: Any) -> None:
    with pytest.raises(ConfigError, match="at least two finite"):
        statistics.paired_bootstrap(values, seed=0)


@pytest.mark.parametrize("margin", [0.0, math.nan])
def test_a_margin_that_is_not_between_0_and_1_is_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin"):
        statistics.paired_equivalence([0, 1], margin=margin, seed=0)


# Mean 3, standard error sqrt(0.5).
ONE_TO_FIVE = [1.0, 2.0, 3.0, 4.0, 5.0]
STANDARD_ERROR = math.sqrt(0.5)


def test_the_interval_of_a_mean_is_the_published_one() -> None:
    half = 2.776445 * STANDARD_ERROR  # t(4) at 97.5 % is 2.776445
    interval = statistics.t_interval(ONE_TO_FIVE)
    assert interval == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert statistics.t_interval([2, 2]) == (2, 2)


def test_the_mean_of_students_sleep_data_is_not_0() -> None:
    """Student 1908 (Biometrika 6, 1-25): the difference in hours of sleep, t = 4.0621, 9 df."""
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert statistics.t_test(hours) == pytest.approx(0.002833, abs=1e-6)
    assert statistics.t_test([-hour for hour in hours]) == statistics.t_test(hours)
    assert (statistics.t_test([0, 0]), statistics.t_test([2, 2])) == (1, 0)


def test_the_equivalence_of_a_mean_is_the_published_one() -> None:
    centred = [value - 3 for value in ONE_TO_FIVE]
    margin = 2.131847 * STANDARD_ERROR  # t = margin / error; P(t(4) > 2.131847) is 5 %
    assert statistics.tost(centred, margin=margin) == pytest.approx(0.05, rel=1e-5)
    at_the_margin = [value + 1 for value in centred]
    assert statistics.tost(at_the_margin, margin=1.0) == pytest.approx(0.5)


def test_equal_values_are_equivalent_to_zero_exactly_inside_the_margin() -> None:
    assert statistics.tost([0, 0], margin=1) == 0
    assert statistics.tost([2, 2], margin=1) == 1


PAIRS = [
    ([0] * 149, True),
    ([0] * 148, None),  # 0.98^148 > 5 %: too few items for silence to mean anything
    ([1] * 69 + [-1] + [0] * 30, False),
    ([1] * 5 + [-1] * 5 + [0] * 990, True),  # flips that cancel, few enough
    ([1] * 62 + [-1] * 62 + [0] * 876, True),  # by the 90 % interval; the 95 % one is ±0.022
    ([1] * 250 + [-1] * 250 + [0] * 500, False),  # the same difference, too noisy to tell
]


@pytest.mark.parametrize(("differences", "expected"), PAIRS)
def test_equivalence_needs_the_interval_inside_the_margin_and_enough_items(
    differences: Any, expected: Any
) -> None:
    assert statistics.paired_equivalence(differences, margin=0.02, seed=0) is expected
