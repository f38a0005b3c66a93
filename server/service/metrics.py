"""Prometheus metrics: prefix `crma_`, vLLM's suffixes, units and buckets.

Two sources: what a request's own life shows (histograms, fed by `server/frontend.py`) and the engine's counters, read
from `stats()` when Prometheus asks. The `adapter` label holds names of the store only, `base`, and `_other` for all
adapters after the first `max_adapter_labels`: a client cannot make new series.
"""

import math
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

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

# Buckets, in seconds.
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
ITL = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


Names = Mapping[str, str]  # digest -> store name
Labels = tuple[str, str]  # of a request: adapter (see `adapter_label`), crma (on or off)

# What is read from EngineStats: its field, the metric, the help text.
ENGINE = (
    (
        GaugeMetricFamily,
        "num_requests_running",
        "num_requests_running",
        "Requests in the running batch.",
    ),
    (GaugeMetricFamily, "num_requests_waiting", "num_requests_waiting", "Requests in the queue."),
    (
        GaugeMetricFamily,
        "kv_cache_usage",
        "kv_cache_usage_perc",
        "Share of KV blocks in use, 0 to 1.",
    ),
    (CounterMetricFamily, "num_steps", "engine_steps", "Forward steps."),
    (
        CounterMetricFamily,
        "num_preemptions",
        "num_preemptions",
        "Sequences that gave way and are computed again.",
    ),
    (CounterMetricFamily, "prompt_tokens", "prompt_tokens", "Prompt tokens, cached ones too."),
    (CounterMetricFamily, "generation_tokens", "generation_tokens", "Sampled tokens."),
    (
        CounterMetricFamily,
        "prefix_cache_queries",
        "prefix_cache_queries",
        "Prompt tokens sought in the prefix cache.",
    ),
    (
        CounterMetricFamily,
        "prefix_cache_hits",
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
    ),
    (
        CounterMetricFamily,
        "adapter_evictions",
        "adapter_evictions",
        "Adapters that made room for another.",
    ),
)


class Metrics(Collector):
    """Everything on one registry of its own, so that two apps in one process do not meet."""

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
        """The bounded label of a store name; None is the base model."""
        if name is None:
            return "base"
        if name not in self._labelled and len(self._labelled) >= self._max_adapter_labels:
            return "_other"
        self._labelled.add(name)
        return name

    def ended(self, labels: Labels, reason: str, times: Timings | None) -> None:
        """A request is over: why (stop, length, abort, error), and its times if all of it ended well."""
        self.success.labels(reason, *labels).inc()
        if times is not None:
            self.queue.labels(*labels).observe(times.queue_s)
            self.e2e.labels(*labels).observe(times.e2e_s)
            if times.ttft_s is not None:
                self.ttft.labels(*labels).observe(times.ttft_s)

    def set_backbone(self, backbone: BackboneEntry | None) -> None:
        """What serves from now on; the last one's series goes."""
        self.backbone_info.clear()
        self.spectral_bound.set(0)
        if backbone is not None:
            self.backbone_info.labels(backbone.version, backbone.digest).set(1)
            bound = backbone.manifest.certificate.get("max_bound")
            self.spectral_bound.set(bound if isinstance(bound, float) else math.nan)

    def set_ablation(self, accuracies: Mapping[str, float | None]) -> None:
        """Accuracy per variant; what could not be scored is no number."""
        self.last_ablation.clear()
        for variant, accuracy in accuracies.items():
            if accuracy is not None:
                self.last_ablation.labels(variant=variant).set(accuracy)

    def watch(
        self, stats: Callable[[], EngineStats], names: Callable[[], Names], max_adapters: int
    ) -> None:
        """Adds the engine's counters: `names` gives digest -> store name of task adapters."""
        self._stats, self._names, self._max_adapters = stats, names, max_adapters
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the engine says at this moment: no loop keeps copies that can go stale."""
        stats, names = self._stats(), self._names()
        for family, attribute, name, help in ENGINE:
            yield family(f"crma_{name}", help, value=getattr(stats, attribute))
        loads, seconds = stats.adapter_loads, stats.adapter_load_seconds
        help = "Loads of adapters and the time they took."
        yield SummaryMetricFamily(
            "crma_adapter_load_seconds", help, count_value=loads, sum_value=seconds
        )
        yield self._residency(stats, names)
        yield self._lora_info(stats, names)

    def _residency(self, stats: EngineStats, names: Names) -> Metric:
        family = GaugeMetricFamily(
            "crma_adapter_resident", "Versions of the adapter in memory.", labels=("adapter",)
        )
        counts = Counts({self.adapter_label(name): 0 for name in names.values()})
        counts.update(
            self.adapter_label(name) for digest, name in names.items() if digest in stats.resident
        )
        for label, count in counts.items():
            family.add_metric((label,), count)
        return family

    def _lora_info(self, stats: EngineStats, names: Names) -> Metric:
        """vLLM's gauge, which the Kubernetes Gateway API Inference Extension routes by; its value is the time."""
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters in use, as routers read them.", labels=labels
        )

        def named(digests: Iterable[str]) -> str:
            return ",".join(sorted({names[digest] for digest in digests if digest in names}))

        in_use = named(stats.running_adapters), named(stats.waiting_adapters)
        family.add_metric((str(self._max_adapters), *in_use), time.time())
        return family
