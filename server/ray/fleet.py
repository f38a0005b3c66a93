"""The states of all replicas, as one engine's."""

from collections.abc import Iterable
from dataclasses import fields

from server.engine.request import EngineCounters, EngineStats, PoolCounters
from server.ray.call import Status

COUNTERS = [each.name for kind in (EngineCounters, PoolCounters) for each in fields(kind)]
SUMS = ("num_requests_running", "num_requests_waiting", "adapter_uses", "num_blocks")
UNIONS = ("resident", "running_adapters", "waiting_adapters")


class Fleet:
    """What is known of the replicas that run, and what those that have ended had done.

    Attributes:
        running: the states of the replicas that run, by name.
    """

    def __init__(self) -> None:
        self.running: dict[str, EngineStats] = {}
        self._ended: dict[str, EngineStats] = {}

    def see(self, status: Status) -> None:
        """Note the state of a replica that runs."""
        self._ended.pop(status.name, None)
        self.running = {**self.running, status.name: status.stats}

    def see_all(self, statuses: Iterable[Status]) -> set[str]:
        """Note the states of all replicas that run now. Returns the names of new ones."""
        running = {each.name: each.stats for each in statuses}
        known = self.running
        self._ended |= {name: known[name] for name in known.keys() - running.keys()}
        for name in running:
            self._ended.pop(name, None)  # it had only been late
        self.running = running
        return set(running.keys() - known.keys())

    def stats(self) -> EngineStats:
        """The state of all as of one engine. May be called in any thread.

        Counters are of all replicas that ever ran, so that they never go down.
        """
        running = list(self.running.values())
        ever = [*running, *self._ended.values()]
        total = EngineStats(has_failed=not running)
        if not running:
            total.failure = "no replica runs"
        for name in COUNTERS:
            setattr(total, name, sum(getattr(each, name) for each in ever))
        for name in SUMS:
            setattr(total, name, sum(getattr(each, name) for each in running))
        for name in UNIONS:
            found = {digest for each in running for digest in getattr(each, name)}
            setattr(total, name, tuple(sorted(found)))
        total.block_size = max((each.block_size for each in running), default=0)
        total.kv_cache_usage = _mean([each.kv_cache_usage for each in running])
        return total


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
