"""Connections that end before there is a request: counted by reason, and logged now and then."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable

from server.service.errors import (
    HeadTooLarge,
    MalformedRequest,
    RequestTimeout,
    TooManyConnections,
)
from server.service.metrics import Metrics

log = logging.getLogger("server")

DISPLACED = "displaced"
"""It waited for its client, and was closed to make room for another."""

REASONS = (
    *(each.code for each in (TooManyConnections, HeadTooLarge, RequestTimeout, MalformedRequest)),
    DISPLACED,
)
INTERVAL_S = 10.0  # between two lines of one reason, however many clients are refused


class Refusals:
    """The refused connections of one server. Only the event loop uses it.

    Args:
        clock: seconds; never goes back.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._counter = metrics.connections_refused
        self._clock = clock
        self._logged_at: dict[str, float] = {}
        self._unlogged: Counter[str] = Counter()
        for reason in REASONS:
            self._counter.labels(reason)

    def add(self, reason: str, client: tuple[str, int] | None) -> None:
        """Count a connection.

        Args:
            reason: one of REASONS.
            client: its address, for the log.
        """
        self._counter.labels(reason).inc()
        self._unlogged[reason] += 1
        now = self._clock()
        if now - self._logged_at.get(reason, -math.inf) < INTERVAL_S:
            return
        self._logged_at[reason] = now
        count = self._unlogged.pop(reason)
        last = "unknown" if client is None else client[0]
        log.warning("connections refused: %s: %d since the last line, from %s", reason, count, last)
