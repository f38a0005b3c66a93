"""Metrics of the replicas, beside those of all of them together."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.ray.remote_engine import RemoteEngine

BY_REPLICA = (
    (
        GaugeMetricFamily,
        "num_requests_running",
        "num_requests_running",
        "Requests in the replica's running batch.",
    ),
    (
        GaugeMetricFamily,
        "num_requests_waiting",
        "num_requests_waiting",
        "Requests in the replica's queue.",
    ),
    (
        GaugeMetricFamily,
        "kv_cache_usage",
        "kv_cache_usage_perc",
        "Share of the replica's KV blocks in use, 0 to 1.",
    ),
    (
        CounterMetricFamily,
        "generation_tokens",
        "generation_tokens",
        "Tokens that the replica has sampled.",
    ),
)
"""Family, field of EngineStats, name and help."""


class ReplicaMetrics(Collector):
    """Gauges of each replica that runs, and what became of requests whose replica ended."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        num_running = len(self._engine.fleet.running)
        yield GaugeMetricFamily("crma_replicas", "Replicas that run.", value=num_running)
        yield from self._by_replica()
        counters = self._engine.counters
        yield CounterMetricFamily(
            "crma_requests_retried",
            "Requests that ran again because their replica had ended.",
            value=counters.num_retried,
        )
        yield CounterMetricFamily(
            "crma_requests_lost",
            "Requests that failed because their replica had ended.",
            value=counters.num_lost,
        )

    def _by_replica(self) -> Iterator[Metric]:
        running = self._engine.fleet.running
        for kind, field, name, help in BY_REPLICA:
            family = kind(f"crma_replica_{name}", help, labels=("replica",))
            for replica, stats in running.items():
                family.add_metric((replica,), getattr(stats, field))
            yield family
        resident = GaugeMetricFamily(
            "crma_replica_resident_adapters",
            "Adapters in the replica's memory.",
            labels=("replica",),
        )
        for replica, stats in running.items():
            resident.add_metric((replica,), len(stats.resident))
        yield resident
