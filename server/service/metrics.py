"""Prometheus metrics: prefix `crma_`, with vLLM's suffixes, units and buckets.

They have two sources. Histograms observe requests as they finish (`generation.py`); everything else
is read from the engine's `stats()` when Prometheus asks. The `adapter` label takes names of the
store, `base`, and `_other`. The first `max_adapter_labels` adapters that requests use have a label
of their own from then on; all others share `_other`. A client cannot create new series.
"""

import math
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from crma.store.entry import BackboneEntry
from server.engine.request import EngineStats, Timings

# fmt: off
# Buckets in seconds, as vLLM has them.
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
ITL = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)
LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)
# fmt: on

Names = Mapping[str, str]  # digest -> store name
Labels = tuple[str, str]  # of a request: adapter (see `adapter_label`), crma (on or off)


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


class Metrics(Collector):
    """All metrics of one app, in a registry of its own: two apps in one process do not collide."""

    def __init__(self, registry: CollectorRegistry, *, max_adapter_labels: int = 64) -> None:
        self.registry = registry
        self._max_adapter_labels = max_adapter_labels
        self._labelled: set[str] = set()
        by = ("adapter", "crma")

        histogram = partial(Histogram, namespace="crma", labelnames=by, registry=registry)
        counter = partial(Counter, namespace="crma", registry=registry)
        gauge = partial(Gauge, namespace="crma", registry=registry)
        self.ttft = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", buckets=TTFT
        )
        self.itl = histogram(
            "inter_token_latency_seconds", "Gap between tokens of a sequence.", buckets=ITL
        )
        self.e2e = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", buckets=LATENCY
        )
        self.queue = histogram(
            "request_queue_time_seconds", "From arrival until first scheduled.", buckets=LATENCY
        )
        self.success = counter(
            "request_success", "Requests that ended, by reason.", ("finished_reason", *by)
        )
        self.http_responses = counter("http_responses", "HTTP answers.", ("route", "status"))
        self.verification_failures = counter(
            "adapter_verification_failures", "Problems found in the store."
        )
        self.store_problems = gauge(
            "store_problems", "Problems in the store as it was last read; 0 once they are mended."
        )
        self.tasks_unable = gauge(
            "tasks_unable", "Serving tasks that cannot answer; /readyz says why."
        )
        self.backbone_info = gauge(
            "backbone_info", "The CRMA backbone that serves; always 1.", ("version", "digest")
        )
        self.spectral_bound = gauge(
            "spectral_bound", "Largest certified norm bound of a layer; 0: no backbone."
        )
        self.last_ablation = gauge(
            "last_ablation_accuracy", "Accuracy of the last ablation, by variant.", ("variant",)
        )

    def adapter_label(self, name: str | None) -> str:
        """The bounded label of a store name that a request uses; None is the base model."""
        if name is None:
            return "base"
        if len(self._labelled) < self._max_adapter_labels:
            self._labelled.add(name)
        return self._known_label(name)

    def _known_label(self, name: str) -> str:
        """The label that requests have given to a store name."""
        return name if name in self._labelled else "_other"

    def count_request(self, labels: Labels, reason: str, timings: Timings | None) -> None:
        """Count a request that has ended.

        Args:
            reason: stop, length, abort or error.
            timings: observed where the request finished; None where it did not.
        """
        self.success.labels(reason, *labels).inc()
        if timings is None:
            return
        self.queue.labels(*labels).observe(timings.queue_s)
        self.e2e.labels(*labels).observe(timings.e2e_s)
        if timings.ttft_s is not None:
            self.ttft.labels(*labels).observe(timings.ttft_s)

    def set_backbone(self, backbone: BackboneEntry | None) -> None:
        """Show the backbone that serves from now on, in place of the last one."""
        self.backbone_info.clear()
        self.spectral_bound.set(0)
        if backbone is not None:
            self.backbone_info.labels(backbone.version, backbone.digest).set(1)
            bound = backbone.manifest.certificate.get("max_bound")
            self.spectral_bound.set(bound if isinstance(bound, float) else math.nan)

    def set_ablation(self, accuracies: Mapping[str, float | None]) -> None:
        """Show the accuracy of each variant; a variant without a score has no series."""
        self.last_ablation.clear()
        for variant, accuracy in accuracies.items():
            if accuracy is not None:
                self.last_ablation.labels(variant=variant).set(accuracy)

    def watch(
        self, stats: Callable[[], EngineStats], names: Callable[[], Names], max_adapters: int
    ) -> None:
        """Add the engine's metrics; `names` gives digest to store name of task adapters."""
        self._stats = stats
        self._names = names
        self._max_adapters = max_adapters
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's metrics at this moment; no copy of them is kept."""
        stats = self._stats()
        names = self._names()
        for metric in ENGINE_METRICS:
            yield metric.collect(stats)
        yield SummaryMetricFamily(
            "crma_adapter_load_seconds",
            "Loads of adapters and the time they took.",
            count_value=stats.adapter_loads,
            sum_value=stats.adapter_load_seconds,
        )
        yield self._residency(stats, names)
        yield self._lora_info(stats, names)

    def _residency(self, stats: EngineStats, names: Names) -> Metric:
        """How many versions of each adapter are in memory; 0 for those that are not."""
        family = GaugeMetricFamily(
            "crma_adapter_resident", "Versions of the adapter in memory.", labels=("adapter",)
        )
        counts = Counts({self._known_label(name): 0 for name in names.values()})
        for digest, name in names.items():
            if digest in stats.resident:
                counts[self._known_label(name)] += 1
        for label, count in counts.items():
            family.add_metric((label,), count)
        return family

    def _lora_info(self, stats: EngineStats, names: Names) -> Metric:
        """vLLM's gauge, by which the Kubernetes Gateway API Inference Extension routes.

        Its value is the time.
        """
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters in use, as routers read them.", labels=labels
        )

        def joined_names(digests: Iterable[str]) -> str:
            return ",".join(sorted({names[digest] for digest in digests if digest in names}))

        values = (
            str(self._max_adapters),
            joined_names(stats.running_adapters),
            joined_names(stats.waiting_adapters),
        )
        family.add_metric(values, time.time())
        return family
