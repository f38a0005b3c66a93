"""crma.training.ceiling: what an oracle gives over arms without sharing, and what follows."""

from typing import Any

import pytest
from scipy import stats

from crma.core.errors import ConfigError
from crma.training.ceiling import Reach, better_rival, ceiling_table, ceilings, reach

SEEDS = range(20, 25)


def records(over_private: list[float], matched: float = 1.1) -> list[dict[str, Any]]:
    """Five seeds of each arm; ORACLE-loo lies below PRIVATE by so many percent."""
    made = []
    for seed, value in zip(SEEDS, over_private, strict=True):
        losses = {
            "PRIVATE": 1.0,
            "FROZEN-matched": matched,
            "ORACLE-loo": 1 - value / 100,
            "ORACLE": 0.5,
        }
        for arm, loss in losses.items():
            record = {
                "arm": arm,
                "seed": seed,
                "loss": [[loss / 2, loss / 2, 7.0]],
                "pairing": {"seed": seed},
            }
            made.append(record)
    return made


SMALL = [1.0, 0.5, 1.5, 0.8, 1.2]
LARGE = [1.0, 4.0, -1.0, 3.0, 2.0]


def test_the_advantage_of_each_oracle_has_the_interval_of_scipy() -> None:
    found = {(each.oracle, each.rival): each for each in ceilings(records(SMALL))}
    assert len(found) == 4
    loo = found["ORACLE-loo", "PRIVATE"]
    expected = stats.ttest_1samp(SMALL, 0).confidence_interval(0.95)
    assert loo.values == pytest.approx(SMALL)
    assert loo.interval == pytest.approx(tuple(expected))
    assert found["ORACLE", "FROZEN-matched"].mean == pytest.approx(100 * (1 - 0.5 / 1.1))


def test_the_decision_follows_from_the_upper_bound_over_the_better_arm() -> None:
    assert better_rival(records(SMALL)) == "PRIVATE"
    text = ceiling_table(records(SMALL))
    assert "over PRIVATE, the better arm without sharing, is +1.47 %" in text
    assert text.endswith("no protocol of this shape can reach 2 % on these tasks.")
    assert ceiling_table(records(LARGE)).endswith("2 % is not out of reach.")
    # Where FROZEN-matched is the better one, it decides.
    text = ceiling_table(records(LARGE, matched=0.9))
    assert "over FROZEN-matched, the better arm" in text
    assert "can reach 2 %" in text


def test_a_ceiling_needs_two_seeds_and_both_rivals() -> None:
    assert "needs two seeds" in ceiling_table([])
    alone = [each for each in records(SMALL) if each["arm"] in ("PRIVATE", "ORACLE-loo")]
    with pytest.raises(ConfigError, match="runs of PRIVATE and FROZEN-matched"):
        ceiling_table(alone)


def test_two_percent_exactly_is_within_reach() -> None:
    assert Reach("PRIVATE", 2.0).is_open
    assert not Reach("PRIVATE", 1.9999).is_open


def test_one_seed_decides_nothing() -> None:
    made = [each for each in records(SMALL) if each["seed"] == 20 or each["arm"] != "ORACLE-loo"]
    assert reach(made) is None
    assert ceiling_table(made).endswith("ORACLE-loo has fewer than two seeds with its rival.")
    assert str(reach(records(SMALL))) in ceiling_table(records(SMALL))
