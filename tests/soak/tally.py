"""What all clients have seen, counted from many threads."""

import statistics
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

MINUTE = 60.0
MAX_SHOWN = 20  # lines of a kind in the report


@dataclass
class Fault:
    """One kind of fault.

    Attributes:
        tries: how often it was done.
        seen: what its client saw: a status with a code, "closed", or "cut off".
        lost: how often somebody else lost something by it.
        recovered: how often the server answered as before, afterwards.
    """

    tries: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    recovered: int = 0


@dataclass(eq=False)
class Tally:
    """Counts, and examples of what must not happen.

    Attributes:
        counts: (kind of request, what came) -> how often.
        wrong, unexpected, leaks: a line for each answer that is not the expected one, each status
            that its request does not explain, and each thing that a tenant saw of another.
        checked, near_ties: answers compared, and those that are not because two tokens are nearly
            as likely.
    """

    started: float = field(default_factory=time.monotonic)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    checked: int = 0
    near_ties: int = 0
    faults: defaultdict[str, Fault] = field(default_factory=lambda: defaultdict(Fault))
    _ttfts: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, came: str) -> None:
        with self._lock:
            self.counts[kind, came] += 1

    def compare(self, what: str, text: str, expected: str | None) -> None:
        """Compare an answer; None: two of its tokens are nearly as likely."""
        with self._lock:
            if expected is None:
                self.near_ties += 1
                return
            self.checked += 1
            if text != expected:
                self.wrong.append(f"{what}: {text!r} instead of {expected!r}")

    def ttft(self, seconds: float) -> None:
        with self._lock:
            self._ttfts[int((time.monotonic() - self.started) / MINUTE)].append(seconds)

    def fault(self, name: str, saw: str, *, lost: int, recovered: bool) -> None:
        with self._lock:
            fault = self.faults[name]
            fault.tries += 1
            fault.seen[saw] += 1
            fault.lost += lost
            fault.recovered += recovered

    def ttft_by_minute(self) -> list[dict[str, float]]:
        """p50 and p99 in seconds of the streams that began in each minute."""
        rows = []
        for minute, values in sorted(self._ttfts.items()):
            p50 = statistics.median(values)
            row = {"minute": minute, "n": len(values), "p50": p50, "p99": _p99(values)}
            rows.append({name: round(value, 3) for name, value in row.items()})
        return rows

    def report(self) -> dict[str, Any]:
        """All of it, as JSON."""
        num_faults = sum(fault.tries for fault in self.faults.values())
        return {
            "requests": sum(self.counts.values()) + num_faults,
            "answers_compared": self.checked,
            "near_ties": self.near_ties,
            "num_wrong": len(self.wrong),
            "wrong": self.wrong[:MAX_SHOWN],
            "num_unexpected": len(self.unexpected),
            "unexpected": self.unexpected[:MAX_SHOWN],
            "num_tenant_leaks": len(self.leaks),
            "tenant_leaks": self.leaks[:MAX_SHOWN],
            "ttft_by_minute": self.ttft_by_minute(),
            "faults": self.fault_table(),
            "by_kind": self.by_kind(),
        }

    def by_kind(self) -> dict[str, dict[str, int]]:
        """kind of request -> what came -> how often."""
        table: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (kind, came), count in sorted(self.counts.items()):
            table[kind][came] = count
        return dict(table)

    def fault_table(self) -> list[dict[str, Any]]:
        """One row for each kind of fault."""
        return [
            {"fault": name, **vars(fault), "seen": dict(fault.seen.most_common())}
            for name, fault in sorted(self.faults.items())
        ]


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1) + 0.5)]
