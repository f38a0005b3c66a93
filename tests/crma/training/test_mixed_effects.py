"""crma.training.mixed_effects: the model agrees with what is known of balanced designs."""

import math
import random
import sys
from typing import Any

import pytest
from scipy import stats

from crma.core.errors import ConfigError
from crma.training.mixed_effects import Effect, mixed_effects

pytest.importorskip("statsmodels")
TASKS = ("a", "b", "c", "d", "last")
SEEDS = range(12)


def arms(effect: float, noise: float) -> tuple[dict[int, Any], dict[int, Any], list[float]]:
    """Two arms, whose log losses differ by `effect` and noise, and all differences."""
    rng = random.Random(0)
    one, other, differences = {}, {}, []
    for seed in SEEDS:
        losses: tuple[list[float], list[float]] = ([], [])
        for level in (0.3, 0.6, 0.9, 1.2):
            shared = math.log(level) + rng.gauss(0, 0.1)  # of this task at this seed
            difference = effect + rng.gauss(0, noise)
            differences.append(difference)
            losses[0].append(math.exp(shared + difference))
            losses[1].append(math.exp(shared))
        one[seed] = {"order": TASKS, "loss": [[*losses[0], 9.0]]}
        other[seed] = {"order": TASKS, "loss": [[*losses[1], 9.0]]}
    return one, other, differences


def test_the_estimate_of_a_balanced_design_is_the_mean_of_the_paired_differences() -> None:
    """And its interval is that of the paired test, but for normal quantiles."""
    one, other, differences = arms(effect=-0.05, noise=0.02)
    found = mixed_effects(one, other)
    mean = sum(differences) / len(differences)
    half = stats.norm.ppf(0.975) * stats.sem(differences)
    assert found.percent == pytest.approx(100 * (1 - math.exp(mean)), rel=1e-4)
    expected = [100 * (1 - math.exp(mean + sign * half)) for sign in (1, -1)]
    assert found.interval == pytest.approx(expected, rel=0.02)
    assert found.p < 1e-6


def test_no_effect_is_not_found() -> None:
    one, other, _ = arms(effect=0.0, noise=0.05)
    found = mixed_effects(one, other)
    assert found.interval[0] < 0 < found.interval[1]
    assert found.p > 0.05
    assert isinstance(found, Effect)


def test_without_statsmodels_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels.formula.api", None)
    one, other, _ = arms(effect=0.0, noise=0.05)
    with pytest.raises(ConfigError, match=r"pip install 'crma-server\[train\]'"):
        mixed_effects(one, other)
