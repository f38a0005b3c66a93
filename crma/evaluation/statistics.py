"""Intervals and tests: of a proportion, of paired binary items, of a mean over seeds.

Two-sided, 95 % unless said otherwise. Every function is pure; the only random one takes its seed. Too few values
or a number that cannot be used is a ConfigError, impossible counts are a ValueError (scipy's own); never a NaN.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from crma.core.errors import ConfigError

Interval = tuple[float, float]

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000


def wilson(correct: int, scored: int) -> Interval:
    """Score interval of a proportion, `correct` of `scored` items; lies in [0, 1] and holds `correct / scored`.

    Source: Wilson 1927 (JASA 22, 209-212), without continuity correction, as scipy's `binomtest` computes it.
    """
    found = stats.binomtest(correct, scored).proportion_ci(
        confidence_level=CONFIDENCE, method="wilson"
    )
    proportion = (
        correct / scored
    )  # at 0 and 1 the formula's end is the proportion itself, up to rounding
    return min(max(0.0, float(found.low)), proportion), max(min(1.0, float(found.high)), proportion)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of "a flip is as likely one way as the other"; 1 where nothing flipped.

    Source: McNemar 1947 (Psychometrika 12, 153-157) in its exact form: given the number of flips, those gained are
    Binomial(gained + lost, 1/2).
    """
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted for all of them being looked at: at 5 %, any false alarm among them has 5 %. In the order given.

    Source: Holm 1979 (Scand. J. Statist. 6, 65-70): the i-th smallest of m times m - i + 1, never below the one before.
    """
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    return [float(p) for p in np.minimum(stepped, 1.0)[np.argsort(order)]]


def mcnemar_power(difference: float, flips: float, n: int) -> float:
    """Probability that `mcnemar` on n items gives p <= 5 %, where a share `flips` of them flips, `difference` more one
    way than the other (difference <= flips).

    Source: Duffy 1984 (Biometrics 40, 1005-1015): the number of flips is Binomial(n, flips), those gained of them
    Binomial(number, (1 + difference / flips) / 2); the sum is over both.
    """
    number = np.arange(stats.binom.ppf(1e-9, n, flips), stats.binom.isf(1e-9, n, flips) + 1)
    most = stats.binom.ppf(ALPHA / 2, number, 0.5)  # as many, or fewer, one way are significant
    most -= stats.binom.cdf(most, number, 0.5) > ALPHA / 2
    towards = (1 + difference / flips) / 2
    one_way = stats.binom.cdf(most, number, towards) + stats.binom.cdf(most, number, 1 - towards)
    return float(stats.binom.pmf(number, n, flips) @ one_way)


def detectable_difference(flipped: int, n: int) -> float | None:
    """The smallest true difference that `mcnemar` on n items finds (p <= 5 %) with 80 % power, to 1e-4. None: not any.

    The share of items that flip is taken to be the one observed, `flipped` of n, or the difference if that is more.
    """

    def is_found(difference: float) -> bool:
        return mcnemar_power(difference, max(difference, flipped / n), n) >= POWER

    if not is_found(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if is_found(middle) else (middle, high)
    return high


def detectable_mean(values: Sequence[float]) -> float:
    """The same of a mean that is tested against 0, with the spread of `values` [n >= 2] and n; taken as normal."""
    return float((stats.norm.isf(ALPHA / 2) + stats.norm.ppf(POWER)) * stats.sem(values))


def paired_bootstrap(
    differences: Sequence[float], *, seed: int, confidence: float = CONFIDENCE
) -> Interval:
    """Percentile interval of the mean of `differences` [n], one per item, over RESAMPLES resamples of the items.

    The same differences and seed give the same interval, whatever the order of the items.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3; resampling pairs is resampling
    their differences. How often each *distinct* difference is drawn is Multinomial(n, counts / n): the same law as
    drawing n indices, and 3 numbers a resample instead of n where the items are right or wrong.
    """
    n = len(differences)
    if n < 2 or not np.isfinite(differences).all():
        message = "A spread needs at least two finite numbers."
        raise ConfigError(
            message, field="differences", value=f"{n} values", allowed="at least 2 finite numbers"
        )
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    means = (drawn @ values) / n
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_equivalence(differences: Sequence[float], *, margin: float, seed: int) -> bool | None:
    """Whether two variants are as good as each other, within `margin`, on paired right-or-wrong items.

    `differences` [n] holds 1 (gained), -1 (lost) or 0. True: the 90 % bootstrap interval of their mean lies strictly
    inside (-margin, margin). False: it does not, so equivalence is not shown (which is not "different"). None: it
    does, but n is too small for that to mean anything, so nothing is claimed.

    Source: two one-sided tests at 5 % are the 90 % interval inside the margin (Schuirmann 1987). A bootstrap cannot
    draw a flip that it has not seen: no flip in 5 items would "prove" equivalence. A true difference of `margin`
    flips at least that share of items, so n items show none with probability (1 - margin)^n at most; that must
    be <= 5 %, the "rule of three" (Hanley & Lippman-Hand 1983, JAMA 249, 1743-1745): 149 items for 2 points.
    """
    check_share(margin)
    low, high = paired_bootstrap(differences, seed=seed, confidence=1 - 2 * ALPHA)
    if not -margin < low <= high < margin:
        return False
    return True if (1 - margin) ** len(differences) <= ALPHA else None


def t_interval(values: Sequence[float]) -> Interval:
    """Interval of the mean of `values` [n >= 2], taken as normal ("Student" 1908). Equal values have no width."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, error)
    return float(low), float(high)


def tost(values: Sequence[float], *, margin: float) -> float:
    """p of two one-sided t-tests: small where the mean of `values` [n >= 2] lies within ±margin (Schuirmann 1987).

    Equal values have no error: p is 0 inside the margin and 1 elsewhere.
    """
    if np.ptp(values) == 0:
        return 0.0 if abs(values[0]) < margin else 1.0
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    return float(max(above, stats.ttest_1samp(values, margin, alternative="less").pvalue))


def check_share(margin: float) -> None:
    """ConfigError unless `margin` can be the margin of `paired_equivalence`: a share of items in (0, 1)."""
    if not 0 < margin < 1:
        message = "The margin of equivalence is a share of items."
        raise ConfigError(message, field="margin", value=str(margin), allowed="0 < margin < 1")
