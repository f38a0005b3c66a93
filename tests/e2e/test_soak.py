"""Mixed load, churn, wrong input, and a kill every ten minutes, on the real model for an hour.

python -m pytest -m e2e tests/e2e/test_soak.py --soak-minutes 4
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from soak.soak import Soak

pytestmark = pytest.mark.e2e

LIFE_S = 600.0
MIN_LIVES = 3  # so that it is killed twice
MAX_MIB_PER_HOUR = 200.0  # in the mean of the lives


def report(soak: Soak) -> dict[str, Any]:
    tally = soak.tally
    owners = soak.owners
    return {
        "requests": sum(tally.counts.values()) + sum(each.tries for each in tally.faults.values()),
        "answers_compared": tally.checked,
        "near_ties": tally.near_ties,
        "wrong_answers": len(tally.wrong),
        "unexpected": len(tally.unexpected),
        "jobs": {
            name: sum(getattr(owner, f"num_{name}") for owner in owners)
            for name in ("accepted", "done", "cancelled", "resumed")
        },
        "lost_jobs": sum(len(owner.lost) for owner in owners),
        "tenant_checks": soak.spy.num_checks,
        "shared_prefixes": soak.spy.num_shared,
        "tenant_leaks": len(tally.leaks),
        "complaints_in_logs": len(soak.server.complaints()),
        "recovery_s": [round(each, 1) for each in soak.server.starts_s[1:]],
        "lives": [life.report() for life in soak.lives],
        "ttft_by_minute": tally.ttft_by_minute(),
        "faults": tally.fault_table(),
        "by_kind": tally.by_kind(),
    }


def test_an_hour_of_everything_loses_and_leaks_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 60 * request.config.getoption("--soak-minutes")
    num_lives = max(MIN_LIVES, round(seconds / LIFE_S))
    soak = Soak(tmp_path)
    with soak.working():
        soak.begin()
        soak.run(num_lives, seconds / num_lives)
    with capsys.disabled():
        sys.stderr.write(json.dumps(report(soak), indent=1) + "\n")
    assert soak.tally.wrong == []
    assert soak.tally.unexpected == []
    assert soak.tally.leaks == []
    assert soak.server.complaints() == []
    for owner in soak.owners:
        assert owner.lost == []
        assert owner.num_done > 0
    check_lives(soak)


def check_lives(soak: Soak) -> None:
    for life in soak.lives:
        assert life.leaked() == {}
        assert life.num_unhealthy == 0
    assert soak.lives[-1].exit_code == 0
    slopes = [each for each in (life.mib_per_hour() for life in soak.lives) if each is not None]
    if slopes:
        assert statistics.mean(slopes) < MAX_MIB_PER_HOUR, slopes
