"""Metrics of the replicas, beside those of all of them together."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.ray.remote_engine import RemoteEngine

LABELS = ("replica",)


class ReplicaMetrics(Collector):
    """Gauges of each replica that runs, and what became of requests whose replica ended."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        running = self._engine.fleet.running
        yield GaugeMetricFamily("crma_replicas", "Replicas that run.", value=len(running))
        gauges = {
            "num_requests_running": "Requests in the replica's running batch.",
            "num_requests_waiting": "Requests in the replica's queue.",
            "kv_cache_usage": "Share of the replica's KV blocks in use, 0 to 1.",
        }
        for field, help in gauges.items():
            family = GaugeMetricFamily(f"crma_replica_{field}", help, labels=LABELS)
            for name, stats in running.items():
                family.add_metric((name,), getattr(stats, field))
            yield family
        resident = GaugeMetricFamily(
            "crma_replica_resident_adapters", "Adapters in the replica's memory.", labels=LABELS
        )
        for name, stats in running.items():
            resident.add_metric((name,), len(stats.resident))
        yield resident
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
