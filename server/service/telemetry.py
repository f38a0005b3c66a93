"""Traces and metrics by OpenTelemetry's conventions for generative AI, sent to a collector.

A request over HTTP is a span that FastAPI makes, with the caller's `traceparent` as its parent.
Below it, each prompt is a span `chat MODEL` or `text_completion MODEL` with the spans `queue`,
`prefill` and `decode`. Spans and metrics hold names, counts and times; never a prompt, an answer
or a key.

https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.metrics import Histogram
from opentelemetry.trace import SpanKind, StatusCode

from crma.core.errors import ConfigError
from server import __version__
from server.service.outcome import Outcome

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider

PROVIDER = "crma"
CLOSE_SECONDS = 5.0  # a collector that does not answer must not hold up the end of the server
NANOSECONDS = 1_000_000_000

# Bounds in seconds, as the conventions have them.
DURATION = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28),
    *(2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)


class Telemetry:
    """Records requests that have run.

    Args:
        tracers, meters: `close` ends them.
        model: the name of the base model.
    """

    def __init__(self, tracers: "TracerProvider", meters: "MeterProvider", model: str) -> None:
        self.tracers = tracers
        self.meters = meters
        self._model = model
        self._tracer = tracers.get_tracer("crma-server", __version__)
        meter = meters.get_meter("crma-server", __version__)

        def histogram(name: str, help: str, bounds: tuple[float, ...]) -> Histogram:
            return meter.create_histogram(
                f"gen_ai.server.{name}",
                unit="s",
                description=help,
                explicit_bucket_boundaries_advisory=bounds,
            )

        self._duration = histogram("request.duration", "From arrival to the end.", DURATION)
        self._ttft = histogram(
            "time_to_first_token", "From arrival to the first token.", FIRST_TOKEN
        )
        self._per_token = histogram(
            "time_per_output_token", "Time for each token after the first.", PER_TOKEN
        )

    def current_trace(self) -> Context | None:
        """Where the spans of a request that is made now belong; None: in no trace."""
        span = trace.get_current_span()
        return get_current() if span.get_span_context().is_valid else None

    def record(self, outcome: Outcome, parent: Context | None) -> None:
        """Record a request that ends now.

        Args:
            parent: of its spans; None: it gets none. Background work has none.
        """
        elapsed_s = time.monotonic() - outcome.request.arrival
        self._measure(outcome, elapsed_s)
        if parent is not None and outcome.request.interactive:
            self._trace(outcome, parent, time.time_ns() - _nanoseconds(elapsed_s))

    def _measure(self, outcome: Outcome, elapsed_s: float) -> None:
        attributes = _common(outcome, self._name(outcome.labels[0]))
        timings = outcome.timings
        if timings is None:
            self._duration.record(
                elapsed_s, {**attributes, "error.type": outcome.error or "_OTHER"}
            )
            return
        self._duration.record(timings.e2e_s, attributes)
        if timings.ttft_s is None or timings.decode_s is None:
            return
        self._ttft.record(timings.ttft_s, attributes)
        num_later = max(outcome.output_tokens) - 1
        if num_later > 0:
            self._per_token.record(timings.decode_s / num_later, attributes)

    def _trace(self, outcome: Outcome, parent: Context, started: int) -> None:
        """Make the spans of a request.

        Args:
            started: when it arrived, in nanoseconds since 1970.
        """
        model = outcome.task or self._model
        attributes = {**_common(outcome, model), **_details(outcome)}
        name = f"{attributes['gen_ai.operation.name']} {model}"
        span = self._tracer.start_span(
            name, parent, SpanKind.INTERNAL, attributes, start_time=started
        )
        ended = time.time_ns()
        if outcome.error is not None:
            span.set_attribute("error.type", outcome.error)
            span.set_status(StatusCode.ERROR)
        timings = outcome.timings
        if timings is not None:
            ended = started + _nanoseconds(timings.e2e_s)
            below = trace.set_span_in_context(span, parent)
            at = started
            phases = (
                ("queue", timings.queue_s),
                ("prefill", timings.prefill_s),
                ("decode", timings.decode_s),
            )
            for phase, seconds in phases:
                if seconds is not None:
                    child = self._tracer.start_span(phase, below, start_time=at)
                    at += _nanoseconds(seconds)
                    child.end(at)
        span.end(ended)

    def _name(self, label: str) -> str:
        """The bounded name of a model in metrics: the task's label, or the base model's name."""
        return self._model if label == "base" else label

    async def close(self) -> None:
        """Send what is left, for at most `CLOSE_SECONDS`."""
        thread = threading.Thread(target=self._shut_down, name="telemetry", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, CLOSE_SECONDS)

    def _shut_down(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()


def connect(endpoint: str, model: str) -> Telemetry:
    """Telemetry that goes to a collector by OTLP over HTTP.

    OpenTelemetry's own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS and others) are read by its SDK.

    Args:
        endpoint: the collector's address, without `/v1/traces`.
        model: the name of the base model.

    Raises:
        ConfigError: the SDK is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import metrics
        from opentelemetry.sdk import trace as tracing
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        message = "traces need packages that are not installed: pip install 'crma-server[otel]'"
        raise ConfigError(message, field="otlp_endpoint", value=endpoint, allowed=None) from error
    base = endpoint.rstrip("/")
    own = Resource({"service.name": "crma-server", "service.version": __version__})
    resource = own.merge(OTELResourceDetector().detect())  # what the operator set counts
    tracers = tracing.TracerProvider(resource=resource, shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces")))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{base}/v1/metrics"))
    meters = metrics.MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    return Telemetry(tracers, meters, model)


def _common(outcome: Outcome, model: str) -> dict[str, Any]:
    """The attributes that spans and metrics share; their values are bounded if `model` is."""
    return {
        "gen_ai.operation.name": outcome.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "crma.enabled": outcome.labels[1] == "on",
    }


def _details(outcome: Outcome) -> dict[str, Any]:
    """The attributes of a span beside those."""
    request = outcome.request
    sampling = request.sampling
    details = {
        "gen_ai.response.id": request.id,
        "gen_ai.response.finish_reasons": [str(reason) for reason in outcome.reasons],
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": outcome.cached_tokens,
        "gen_ai.usage.output_tokens": sum(outcome.output_tokens),
        "crma.task.digest": request.selection.task_digest,
        "crma.backbone.digest": request.selection.crma_digest,
    }
    return {name: value for name, value in details.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * NANOSECONDS)
