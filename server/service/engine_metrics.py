"""Metrics that are read from the engine's `stats()` when Prometheus asks; no copy is kept."""

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from server.engine.request import EngineStats
from server.service.metrics import Metrics

Names = Mapping[str, str]  # digest -> store name


class EngineMetric(NamedTuple):
    """A metric that is read from a field of EngineStats. `name` has neither prefix nor `_total`."""

    family: type[CounterMetricFamily] | type[GaugeMetricFamily]
    field: str
    name: str
    help: str

    def collect(self, stats: EngineStats) -> Metric:
        """The metric's current value."""
        return self.family(f"crma_{self.name}", self.help, value=getattr(stats, self.field))


_GAUGE = partial(EngineMetric, GaugeMetricFamily)
_COUNTER = partial(EngineMetric, CounterMetricFamily)
ENGINE_METRICS = (
    _GAUGE("num_requests_running", "num_requests_running", "Requests in the running batch."),
    _GAUGE("num_requests_waiting", "num_requests_waiting", "Requests in the queue."),
    _GAUGE("kv_cache_usage", "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1."),
    _GAUGE("adapter_uses", "adapter_uses", "Uses of adapters by running sequences; 0 when idle."),
    _COUNTER("num_steps", "engine_steps", "Forward steps."),
    _COUNTER("num_preemptions", "num_preemptions", "Sequences preempted and computed again."),
    _COUNTER("prompt_tokens", "prompt_tokens", "Prompt tokens, cached ones too."),
    _COUNTER("generation_tokens", "generation_tokens", "Sampled tokens."),
    _COUNTER(
        "prefix_cache_queries",
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
    ),
    _COUNTER("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    _COUNTER("adapter_evictions", "adapter_evictions", "Adapters evicted to make room for others."),
)


@dataclass(eq=False)
class EngineMetrics(Collector):
    """The engine's metrics.

    Args:
        metrics: gives adapters their labels.
        stats: of the engine.
        names: digest to store name, of task adapters.
        models: digest to what clients send as `model`, of task adapters.
        max_adapters: that requests of one step can have.
    """

    metrics: Metrics
    stats: Callable[[], EngineStats]
    names: Callable[[], Names]
    models: Callable[[], Names]
    max_adapters: int

    def collect(self) -> Iterator[Metric]:
        """The engine's metrics at this moment."""
        stats = self.stats()
        names = self.names()
        for metric in ENGINE_METRICS:
            yield metric.collect(stats)
        yield SummaryMetricFamily(
            "crma_adapter_load_seconds",
            "Loads of adapters and the time they took.",
            count_value=stats.adapter_loads,
            sum_value=stats.adapter_load_seconds,
        )
        yield self._residency(stats, names)
        yield self._lora_info(stats, self.models())

    def _residency(self, stats: EngineStats, names: Names) -> Metric:
        """How many versions of each adapter are in memory; 0 for those that are not."""
        family = GaugeMetricFamily(
            "crma_adapter_resident", "Versions of the adapter in memory.", labels=("adapter",)
        )
        label_of = self.metrics.known_label
        counts = Counts({label_of(name): 0 for name in names.values()})
        for digest, name in names.items():
            if digest in stats.resident:
                counts[label_of(name)] += 1
        for label, count in counts.items():
            family.add_metric((label,), count)
        return family

    def _lora_info(self, stats: EngineStats, models: Names) -> Metric:
        """vLLM's gauge, by which llm-d and the Gateway API Inference Extension route.

        They compare its names with `model` of a request. Adapters in memory count as running,
        because a request for one of them need not wait for a load. The value is the time.
        """
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters in memory, as routers read them.", labels=labels
        )

        def joined_names(digests: Iterable[str]) -> str:
            return ",".join(sorted({models[digest] for digest in digests if digest in models}))

        values = (
            str(self.max_adapters),
            joined_names((*stats.running_adapters, *stats.resident)),
            joined_names(stats.waiting_adapters),
        )
        family.add_metric(values, time.time())
        return family
