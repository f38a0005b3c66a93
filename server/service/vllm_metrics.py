"""vLLM's names beside ours: the series that its Grafana dashboards, autoscalers and routers read.

Each is the sum of our series of the same meaning over adapters and CRMA, so that the two cannot
differ. Names, labels and buckets are those of vLLM 0.32 (vllm/v1/metrics/loggers.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.engine.request import EngineStats
from server.service.engine_metrics import ENGINE_METRICS
from server.service.metrics import Metrics

LABELS = ("model_name", "engine")

SAME_NAMES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions",
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
    }
)
"""Metrics of the engine that vLLM has too, by the same name."""


@dataclass(eq=False)
class VllmMetrics(Collector):
    """vLLM's names for a server of one engine.

    Args:
        metrics: ours.
        stats: of the engine.
        model: the name of the base model.
    """

    metrics: Metrics
    stats: Callable[[], EngineStats]
    model: str

    def __post_init__(self) -> None:
        self._values = (self.model, "0")

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        stats = self.stats()
        for metric in ENGINE_METRICS:
            if metric.name in SAME_NAMES:
                family = metric.family(f"vllm:{metric.name}", metric.help, labels=LABELS)
                family.add_metric(self._values, getattr(stats, metric.field))
                yield family
        for histogram, bounds in self.metrics.histograms:
            yield self._sum_of(histogram, bounds)
        yield self._sum_by_reason(self.metrics.success)
        yield _cache_config(stats)

    def _sum_of(self, histogram: Histogram, bounds: Sequence[float]) -> HistogramMetricFamily:
        """A histogram by vLLM's name, over all labels of ours."""
        (ours,) = histogram.collect()
        buckets = dict.fromkeys(map(floatToGoString, (*bounds, math.inf)), 0.0)
        total = 0.0
        for sample in ours.samples:
            if sample.name.endswith("_bucket"):
                buckets[sample.labels["le"]] += sample.value
            elif sample.name.endswith("_sum"):
                total += sample.value
        name = ours.name.replace("crma_", "vllm:", 1)
        family = HistogramMetricFamily(name, ours.documentation, labels=LABELS)
        family.add_metric(self._values, list(buckets.items()), total)
        return family

    def _sum_by_reason(self, counter: Counter) -> CounterMetricFamily:
        """Requests that ended, by reason, over all labels of ours."""
        (ours,) = counter.collect()
        by_reason: dict[str, float] = {}
        for sample in ours.samples:
            if sample.name.endswith("_total"):
                reason = sample.labels["finished_reason"]
                by_reason[reason] = by_reason.get(reason, 0.0) + sample.value
        labels = (*LABELS, "finished_reason")
        family = CounterMetricFamily("vllm:request_success", ours.documentation, labels=labels)
        for reason, value in by_reason.items():
            family.add_metric((*self._values, reason), value)
        return family


def _cache_config(stats: EngineStats) -> GaugeMetricFamily:
    """The size of the KV cache, which routers read from labels; the value is always 1."""
    labels = ("engine", "block_size", "num_gpu_blocks")
    family = GaugeMetricFamily(
        "vllm:cache_config_info", "Blocks of the KV cache, and tokens of each.", labels=labels
    )
    family.add_metric(("0", str(stats.block_size), str(stats.num_blocks)), 1)
    return family
