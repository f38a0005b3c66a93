"""Mixed load, churn, wrong input, and a kill every ten minutes, on the real model for an hour.

python -m pytest -m e2e tests/e2e/test_soak.py --soak-minutes 4
"""

import json
import statistics
import sys
from pathlib import Path

import pytest
from soak.soak import Soak

pytestmark = pytest.mark.e2e

LIFE_S = 600.0
MIN_LIVES = 3  # so that it is killed twice
MAX_MIB_PER_HOUR = 200.0  # in the mean of the lives


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
        sys.stderr.write(json.dumps(soak.report(), indent=1) + "\n")
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
