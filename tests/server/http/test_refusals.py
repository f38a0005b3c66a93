"""server.http.refusals: what operators see of connections that were refused."""

import pytest
from prometheus_client import CollectorRegistry

from server.http.refusals import DISPLACED, INTERVAL_S, Refusals
from server.service.metrics import Metrics


def test_a_flood_of_refusals_is_a_line_in_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    refusals = Refusals(Metrics(CollectorRegistry()), clock=lambda: now)
    for _ in range(1000):
        refusals.add(DISPLACED, ("192.0.2.1", 9))
    now += INTERVAL_S
    refusals.add(DISPLACED, None)
    assert [each.message for each in caplog.records] == [
        "connections refused: displaced: 1 since the last line, from 192.0.2.1",
        "connections refused: displaced: 1000 since the last line, from unknown",
    ]
