"""Prometheus metrics: prefix `crma_`, with vLLM's suffixes, units and buckets.

This module has what is counted as it happens; `engine_metrics.py` has what is read from the engine.

Labels are bounded. `adapter` takes names of the store, `base`, and `_other`: while all names of the
store fit into `max_adapter_labels`, each has its own; else the first that requests use, and all
others share `_other`. A client cannot create new series.

Counters of what alerts are about exist from the start, at 0: Prometheus's `increase()` sees no
change in a series that begins at 1.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from crma.store.entry import BackboneEntry
from server.engine.request import FinishReason
from server.service.errors import CODES, DeadlineExceeded
from server.service.outcome import Labels, Outcome

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
TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)
# fmt: on

BASE_LABEL = "base"
OTHER_LABEL = "_other"
SWITCH = ("on", "off")  # values of the label `crma`


class Metrics:
    """All metrics of one app, in a registry of its own: two apps in one process do not collide."""

    def __init__(self, registry: CollectorRegistry, *, max_adapter_labels: int = 64) -> None:
        # One series in ten, which Prometheus does not use.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        self._max_adapter_labels = max_adapter_labels
        self._used: set[str] = set()  # names that have a label because requests used them
        self._served: frozenset[str] = frozenset()  # names that have one because all fit
        self.histograms: list[tuple[Histogram, tuple[float, ...]]] = []  # each with its bounds
        self._add_histograms()
        self._add_counters()
        self._add_gauges()
        ProcessCollector(registry=registry)
        self._start_adapters((BASE_LABEL, OTHER_LABEL))

    def _add_histograms(self) -> None:
        by = ("adapter", "crma")
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", by, TTFT
        )
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Gap between tokens of a sequence.", by, ITL
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", by, LATENCY
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "From arrival until first scheduled.", by, LATENCY
        )
        # Without the label `adapter`: with it, each would cost a scrape up to 3,000 series.
        only_crma = ("crma",)
        self.prefill = self._histogram(
            "request_prefill_time_seconds",
            "From first scheduled to the first token.",
            only_crma,
            LATENCY,
        )
        self.decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the end.", only_crma, LATENCY
        )
        self.prompt_length = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt.", only_crma, TOKENS
        )
        self.answer_length = self._histogram(
            "request_generation_tokens", "Tokens of an answer.", only_crma, TOKENS
        )
        self.longest_answer = self._histogram(
            "request_max_num_generation_tokens",
            "Tokens of a request's longest answer.",
            only_crma,
            TOKENS,
        )

    def _histogram(
        self, name: str, help: str, labels: tuple[str, ...], bounds: tuple[float, ...]
    ) -> Histogram:
        made = Histogram(
            name, help, labels, namespace="crma", registry=self.registry, buckets=bounds
        )
        self.histograms.append((made, bounds))
        return made

    def _add_counters(self) -> None:
        counter = partial(Counter, namespace="crma", registry=self.registry)
        self.success = counter(
            "request_success",
            "Requests that ended, by reason.",
            ("finished_reason", "adapter", "crma"),
        )
        self.http_responses = counter("http_responses", "HTTP answers.", ("route", "status"))
        self.errors = counter("errors", "Requests that ended with an error, by code.", ("code",))
        for _, code in CODES:
            self.errors.labels(code)
        self.connections_refused = counter(
            "connections_refused", "Connections that ended before a request came.", ("reason",)
        )
        self.deadlines_missed = counter(
            "deadlines_missed",
            "Requests cut short, by who had set the deadline: client (timeout_s) or server.",
            ("set_by",),
        )
        for who in ("client", "server"):
            self.deadlines_missed.labels(who)
        self.record_failures = counter(
            "record_failures",
            "Failed writes of acts (audit_log: the file, audit: the database) and of usage, which "
            "is tried again.",
            ("record",),
        )
        for record in ("audit_log", "audit", "usage"):
            self.record_failures.labels(record)
        self.verification_failures = counter(
            "adapter_verification_failures", "Problems found in the store."
        )

    def _add_gauges(self) -> None:
        gauge = partial(Gauge, namespace="crma", registry=self.registry)
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
        self.promotion_drift = gauge(
            "promotion_drift_ratio",
            "Growth of a task's validation loss since its publication, as the promotion of the "
            "serving backbone measured it.",
            ("adapter",),
        )
        self.last_ablation = gauge(
            "last_ablation_accuracy", "Accuracy of the last ablation, by variant.", ("variant",)
        )
        self.disk_free = gauge("disk_free_bytes", "Free room where a folder is.", ("folder",))
        self.disk_size = gauge("disk_size_bytes", "All room where a folder is.", ("folder",))

    # Labels ------------------------------------------------------------------------------------

    def serve_adapters(self, names: Collection[str]) -> None:
        """Give every name of the store a label of its own if all fit, and start its counters."""
        all_fit = len(self._used.union(names)) <= self._max_adapter_labels
        served = frozenset(names) if all_fit else frozenset()
        for name in self._served - served - self._used:
            self.success.remove_by_labels({"adapter": name})
        self._start_adapters(served - self._served)
        self._served = served

    def adapter_label(self, name: str | None) -> str:
        """The bounded label of a store name that a request uses; None is the base model."""
        if name is None:
            return BASE_LABEL
        if name not in self._used and len(self._used | {name}) <= self._max_adapter_labels:
            self._used.add(name)
            self._start_adapters((name,))
        return self.known_label(name)

    def known_label(self, name: str) -> str:
        """The label that a store name has."""
        return name if name in self._used or name in self._served else OTHER_LABEL

    def _start_adapters(self, labels: Iterable[str]) -> None:
        """Start the counters of requests that use these adapters."""
        for reason, label, crma in product(FinishReason, labels, SWITCH):
            self.success.labels(str(reason), label, crma)

    def serve_route(self, path: str, statuses: Iterable[int]) -> None:
        """Start the counters of a route's answers."""
        for status in statuses:
            self.http_responses.labels(path, str(status))

    # What happens ------------------------------------------------------------------------------

    def count_request(self, outcome: Outcome) -> None:
        """Count a request that has ended.

        Times and lengths are those of requests that finished and that somebody waits for: an
        ablation gives way to them, so its times say nothing about the server.
        """
        labels = outcome.labels
        crma = labels[1]
        timings = outcome.timings
        self.success.labels(str(outcome.reason), *labels).inc()
        if outcome.error == DeadlineExceeded.code and outcome.request.interactive:
            self.deadlines_missed.labels("client" if outcome.own_deadline else "server").inc()
        if timings is None or not outcome.request.interactive:
            return
        self.queue.labels(*labels).observe(timings.queue_s)
        self.e2e.labels(*labels).observe(timings.e2e_s)
        if timings.ttft_s is not None:
            self.ttft.labels(*labels).observe(timings.ttft_s)
        if timings.prefill_s is not None:
            self.prefill.labels(crma).observe(timings.prefill_s)
        if timings.decode_s is not None:
            self.decode.labels(crma).observe(timings.decode_s)
        self.prompt_length.labels(crma).observe(outcome.prompt_tokens)
        for length in outcome.output_tokens:
            self.answer_length.labels(crma).observe(length)
        self.longest_answer.labels(crma).observe(max(outcome.output_tokens))

    def gaps(self, labels: Labels) -> Histogram:
        """Counts the times between two tokens of a sequence that somebody waits for."""
        return self.itl.labels(*labels)

    def set_backbone(self, backbone: BackboneEntry | None) -> None:
        """Show the backbone that serves from now on, in place of the last one."""
        self.backbone_info.clear()
        self.spectral_bound.set(0)
        if backbone is not None:
            self.backbone_info.labels(backbone.version, backbone.digest).set(1)
            bound = backbone.manifest.certificate.get("max_bound")
            self.spectral_bound.set(bound if isinstance(bound, float) else math.nan)

    def set_drift(self, drift: Mapping[str, float]) -> None:
        """Show how much worse the serving backbone made each task; `_other` has the worst."""
        self.promotion_drift.clear()
        worst: dict[str, float] = {}
        for name, ratio in drift.items():
            label = self.known_label(name)
            worst[label] = max(ratio, worst.get(label, -math.inf))
        for label, ratio in worst.items():
            self.promotion_drift.labels(label).set(ratio)

    def set_ablation(self, accuracies: Mapping[str, float | None]) -> None:
        """Show the accuracy of each variant; a variant without a score has no series."""
        self.last_ablation.clear()
        for variant, accuracy in accuracies.items():
            if accuracy is not None:
                self.last_ablation.labels(variant=variant).set(accuracy)
