"""One life of the server, from a start to an end: its memory, and what it holds when idle."""

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from soak.server_run import ServerRun

MIN_SAMPLES = 60  # seconds of load, for a slope
HOUR = 3600.0
DATABASE = ".sqlite3"  # in the names of its files
MAX_POOLED = 5  # connections that SQLAlchemy keeps open once there were so many at a time
NUM_LOOKS = 5  # at the descriptors: the probe of /healthz has one now and then
HELD = ("crma_kv_cache_usage_perc", "crma_adapter_uses", "crma_num_requests_waiting")


@dataclass(frozen=True)
class IdleState:
    """What a server holds that nobody asks anything.

    Attributes:
        held: blocks (a share), uses of adapters, waiting requests: each must be 0.
        descriptors: by kind; those of NUM_LOOKS looks that are open at each.
    """

    held: dict[str, float]
    descriptors: Counter[str]
    resident_mib: float

    @classmethod
    def of(cls, server: ServerRun, headers: dict[str, str]) -> "IdleState":
        gauges = server.gauges(headers)
        held = {name: gauges[name] for name in HELD}
        descriptors = server.descriptors()
        for _ in range(NUM_LOOKS - 1):
            time.sleep(0.2)
            descriptors &= server.descriptors()
        return cls(held, descriptors, server.resident_mib())


@dataclass
class Life:
    """What was measured of one life.

    Args:
        start_s: from the start of the process until it was ready.

    Attributes:
        memory: (seconds since the start, MiB) under load, after the first load.
        idle: after the first load, and before the end.
        healthz_s: the longest that /healthz took.
        num_unhealthy: how often it did not answer.
        exit_code: None: it was killed.
    """

    start_s: float
    memory: list[tuple[float, float]] = field(default_factory=list)
    idle: list[IdleState] = field(default_factory=list)
    healthz_s: float = 0.0
    num_unhealthy: int = 0
    exit_code: int | None = None

    def mib_per_hour(self) -> float | None:
        """The slope of the memory under load; None: too short a life to tell.

        That of the second half: in the first, caches fill.
        """
        late = self.memory[len(self.memory) // 2 :]
        if len(late) < MIN_SAMPLES:
            return None
        seconds, mib = zip(*late, strict=True)
        return HOUR * statistics.linear_regression(seconds, mib).slope

    def leaked(self) -> dict[str, float]:
        """What an idle server held, and the descriptors that it has more than at the first time."""
        found: dict[str, float] = {}
        for state in self.idle:
            found.update({name: value for name, value in state.held.items() if value})
        if len(self.idle) > 1:
            last = self.idle[-1].descriptors
            more = last - self.idle[0].descriptors
            found.update({name: more[name] for name in more if not _is_pooled(name, last[name])})
        return found

    def report(self) -> dict[str, Any]:
        """A row of the table of lives."""
        slope = self.mib_per_hour()
        return {
            "start_s": round(self.start_s, 1),
            "idle_rss_mib": [round(state.resident_mib) for state in self.idle],
            "rss_mib_per_hour": None if slope is None else round(slope, 1),
            "healthz_max_s": round(self.healthz_s, 3),
            "unhealthy": self.num_unhealthy,
            "descriptors": [state.descriptors.total() for state in self.idle],
            "leaked": self.leaked(),
            "exit_code": self.exit_code,
        }


def _is_pooled(name: str, count: int) -> bool:
    return DATABASE in name and count <= MAX_POOLED
