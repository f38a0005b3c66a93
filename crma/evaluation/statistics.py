"""Intervals and tests: of a proportion, of paired binary items, of a mean over seeds.

Everything is two-sided at 95 % unless it says otherwise. Every function is pure; the one that draws
random numbers takes its seed. Too few values, or numbers that are not finite, raise ConfigError;
impossible counts raise scipy's ValueError. No function returns NaN.

scipy takes a second to import and 60 MiB, which a server needs only once an ablation has ended.
"""

from collections.abc import Sequence

import numpy as np

from crma.core.errors import ConfigError

Interval = tuple[float, float]

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
BLOCK_NUMBERS = 1_000_000  # counts of items that a bootstrap draws at once
TILE = 16  # rows of a matrix that a product handles alike; RESAMPLES is a multiple
_PRECISION = 1e-4  # of `detectable_difference`


def wilson(correct: int, scored: int) -> Interval:
    """Return the score interval of the proportion `correct / scored`.

    The interval lies in [0, 1] and contains the proportion.

    Source: Wilson 1927 (JASA 22, 209-212), without continuity correction, as scipy's `binomtest`
    computes it.
    """
    from scipy import stats

    test = stats.binomtest(correct, scored)
    found = test.proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    # At 0 and 1 an end of the interval equals the proportion, which rounding may miss.
    proportion = correct / scored
    low = min(max(0.0, float(found.low)), proportion)
    high = max(min(1.0, float(found.high)), proportion)
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of the hypothesis that flips go either way equally often.

    It is 1 if nothing flipped.

    Source: McNemar 1947 (Psychometrika 12, 153-157) in its exact form: given the number of flips,
    the gained ones are Binomial(gained + lost, 1/2).
    """
    from scipy import stats

    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests, in the order given.

    Rejecting at 5 % then has at most a 5 % chance of any false alarm among all of them.

    Source: Holm 1979 (Scand. J. Statist. 6, 65-70): multiply the i-th smallest of m by m - i + 1,
    and never let it fall below the one before.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    stepped = np.maximum.accumulate(np.asarray(p_values)[order] * factors)
    in_given_order = np.minimum(stepped, 1.0)[np.argsort(order)]
    return [float(p) for p in in_given_order]


def mcnemar_power(difference: float, flips: float, n: int) -> float:
    """Return the probability that `mcnemar` gives p <= 5 %.

    Args:
        difference: true share of items gained minus that lost; at most `flips`.
        flips: true share of items that flip.
        n: number of items.

    Source: Duffy 1984 (Biometrics 40, 1005-1015): the number of flips is Binomial(n, flips), and
    the gained ones are Binomial(number, (1 + difference / flips) / 2). The sum is over both.
    """
    from scipy import stats

    number = np.arange(stats.binom.ppf(1e-9, n, flips), stats.binom.isf(1e-9, n, flips) + 1)
    # `critical` flips one way, or fewer, are significant; ppf may be one too high.
    critical = stats.binom.ppf(ALPHA / 2, number, 0.5)
    is_too_high = stats.binom.cdf(critical, number, 0.5) > ALPHA / 2
    critical = np.where(is_too_high, critical - 1, critical)
    share_gained = (1 + difference / flips) / 2
    mostly_gained = stats.binom.cdf(critical, number, 1 - share_gained)
    mostly_lost = stats.binom.cdf(critical, number, share_gained)
    return float(stats.binom.pmf(number, n, flips) @ (mostly_lost + mostly_gained))


def detectable_difference(flipped: int, n: int) -> float | None:
    """Return the smallest true difference that `mcnemar` finds with 80 % power, to 1e-4.

    Args:
        flipped: number of items that flipped. The true share of flips is taken to be the observed
            one, or the difference if that is larger.
        n: number of items.

    Returns:
        A share of items, or None if n is too small to find any difference.
    """

    def is_found(difference: float) -> bool:
        return mcnemar_power(difference, max(difference, flipped / n), n) >= POWER

    if not is_found(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if is_found(middle):
            high = middle
        else:
            low = middle
    return high


def detectable_mean(values: Sequence[float]) -> float:
    """Return the smallest true mean that a test against 0 finds with 80 % power.

    Args:
        values: [n >= 2] taken as normal; their spread and number are used, their mean is not.
    """
    from scipy import stats

    return float((stats.norm.isf(ALPHA / 2) + stats.norm.ppf(POWER)) * stats.sem(values))


def paired_bootstrap(
    differences: Sequence[float], *, seed: int, confidence: float = CONFIDENCE
) -> Interval:
    """Return the percentile interval of the mean difference over RESAMPLES resamples of the items.

    The same differences and seed give the same interval, whatever the order of the items.

    Args:
        differences: [n >= 2] one per item.
        seed: of the resampling.
        confidence: level of the interval.

    Raises:
        ConfigError: fewer than two values, or one that is not finite.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3; resampling
    pairs is resampling their differences. The number of times each *distinct* difference is drawn
    is Multinomial(n, counts / n). That is the same distribution as drawing n indices, with 3
    numbers per resample instead of n if the items are right or wrong.
    """
    n = len(differences)
    if n < 2 or not np.isfinite(differences).all():
        message = "A bootstrap interval needs at least two finite numbers."
        allowed = "at least 2 finite numbers"
        raise ConfigError(message, field="differences", value=f"{n} values", allowed=allowed)
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    generator = np.random.default_rng(seed)
    # In blocks of a few megabytes: all at once they are 0.8 GB for 10,000 distinct differences.
    # The product sums the rows of a tile in another order than those left over: whole tiles give
    # the bits that all rows at once give.
    num_rows = max(1, BLOCK_NUMBERS // len(values) // TILE) * TILE
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, num_rows):
        block = means[start : start + num_rows]
        drawn = generator.multinomial(n, counts / n, size=len(block))
        block[:] = (drawn @ values) / n
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_equivalence(differences: Sequence[float], *, margin: float, seed: int) -> bool | None:
    """Test whether two variants are equally good, within `margin`, on right-or-wrong items.

    Args:
        differences: [n] 1 for a gained item, -1 for a lost one, 0 for any other.
        margin: a share of items in (0, 1).
        seed: of the bootstrap.

    Returns:
        True if the 90 % bootstrap interval of the mean lies strictly inside (-margin, margin).
        False if it does not: equivalence is not shown, which does not mean "different".
        None if it does but n is too small for that to mean anything: nothing is claimed.

    Raises:
        ConfigError: the margin is not allowed, or there are too few differences.

    Source: two one-sided tests at 5 % are the 90 % interval inside the margin (Schuirmann 1987). A
    bootstrap cannot draw a flip that it has not seen: no flip in 5 items would "prove" equivalence.
    A true difference of `margin` flips at least that share of items, so n items show no flip with
    probability (1 - margin)^n at most. That must be <= 5 %, the "rule of three" (Hanley &
    Lippman-Hand 1983, JAMA 249, 1743-1745): 149 items for 2 points.
    """
    check_share(margin)
    low, high = paired_bootstrap(differences, seed=seed, confidence=1 - 2 * ALPHA)
    is_inside = -margin < low <= high < margin
    if not is_inside:
        return False
    if (1 - margin) ** len(differences) > ALPHA:
        return None  # too few items
    return True


def t_interval(values: Sequence[float]) -> Interval:
    """Return the interval of the mean of `values` [n >= 2], taken as normal ("Student" 1908).

    The interval of equal values has no width.
    """
    from scipy import stats

    mean = float(np.mean(values))
    error = float(stats.sem(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, error)
    return float(low), float(high)


def t_test(values: Sequence[float]) -> float:
    """Return the two-sided p that the mean of `values` [n >= 2], taken as normal, is 0.

    Equal values have no error: p is then 0, or 1 if they are 0 ("Student" 1908).
    """
    from scipy import stats

    if np.ptp(values) == 0:
        return 0.0 if values[0] else 1.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def tost(values: Sequence[float], *, margin: float) -> float:
    """Return the p of two one-sided t-tests (Schuirmann 1987) on `values` [n >= 2].

    It is small if the mean lies within ±margin. Equal values have no error: p is then 0 inside the
    margin and 1 elsewhere.
    """
    from scipy import stats

    if np.ptp(values) == 0:
        return 0.0 if abs(values[0]) < margin else 1.0
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    return float(max(above, below))


def check_share(margin: float) -> None:
    """Raise ConfigError unless `margin` is a share of items in (0, 1)."""
    if not 0 < margin < 1:
        message = "The equivalence margin must be a share of items between 0 and 1."
        raise ConfigError(message, field="margin", value=str(margin), allowed="0 < margin < 1")
