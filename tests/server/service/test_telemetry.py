"""server.service.telemetry: what a real OTLP/HTTP receiver gets from the server."""

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from server.service import telemetry
from server.settings import Settings

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
SECRET = "Which chapter covers Cholera?"


class Collector:
    """An OTLP/HTTP receiver.

    Attributes:
        bodies: what was posted, by path.
        has_come: set once anything was posted.
        answers: clear it, and no post is answered.
    """

    def __init__(self) -> None:
        self.bodies: dict[str, list[bytes]] = {"/v1/traces": [], "/v1/metrics": []}
        self.has_come = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def spans(self) -> dict[str, Span]:
        """The spans by name; there may be one of each."""
        spans: dict[str, Span] = {}
        for body in self.bodies["/v1/traces"]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        assert span.name not in spans
                        spans[span.name] = span
        return spans

    def histograms(self) -> dict[str, list[HistogramDataPoint]]:
        """The data points of the last report of each histogram, by name."""
        points: dict[str, list[HistogramDataPoint]] = {}
        for body in self.bodies["/v1/metrics"]:
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        points[metric.name] = list(metric.histogram.data_points)
        return points


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A receiver on a free port, and its address."""
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.bodies[self.path].append(body)
            collector.has_come.set()
            collector.answers.wait(60)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{server.server_port}"
        finally:
            collector.answers.set()
            server.shutdown()
            thread.join()


def attributes(of: Span | HistogramDataPoint) -> dict[str, Any]:
    """The attributes as Python values."""
    values = {}
    for attribute in of.attributes:
        value = attribute.value
        kind = value.WhichOneof("value")
        given = getattr(value, kind)
        values[attribute.key] = (
            [each.string_value for each in given.values] if kind == "array_value" else given
        )
    return values


async def test_a_request_is_a_trace_with_its_phases_under_the_callers_span(
    base: BaseModel, store: AdapterStore
) -> None:
    with collecting() as (collector, address):
        async with tiny.serving(base, store.root, otlp_endpoint=f"{address}/") as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"prompt": SECRET, "task": "medical", "max_tokens": 5, "ignore_eos": True}
                answer = await client.post("/generate", json=body, headers=TRACEPARENT)
                await client.get("/healthz")
    assert answer.status_code == 200
    spans = collector.spans()
    assert set(spans) == {
        "POST /generate", "text_completion medical", "queue", "prefill", "decode",
    }  # fmt: skip
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    request, inference = spans["POST /generate"], spans["text_completion medical"]
    assert request.parent_span_id.hex() == PARENT_ID
    assert inference.parent_span_id == request.span_id
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent_span_id for phase in phases} == {inference.span_id}
    borders = [(phase.start_time_unix_nano, phase.end_time_unix_nano) for phase in phases]
    assert borders[0][0] == inference.start_time_unix_nano
    assert borders[0][1] == borders[1][0]
    assert borders[1][1] == borders[2][0]
    assert abs(borders[2][1] - inference.end_time_unix_nano) < 1000
    found = attributes(inference)
    assert found["gen_ai.usage.output_tokens"] == 5
    assert found["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["crma.task.digest"] == answer.json()["provenance"]["task"]
    assert found["crma.enabled"] is True
    sent = b"".join(collector.bodies["/v1/traces"] + collector.bodies["/v1/metrics"])
    assert b"Cholera" not in sent


async def test_the_metrics_are_those_of_the_conventions(
    base: BaseModel, store: AdapterStore
) -> None:
    with collecting() as (collector, address):
        async with tiny.serving(base, store.root, otlp_endpoint=address) as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"prompt": SECRET, "max_tokens": 5, "ignore_eos": True}
                await client.post("/generate", json=body)
                engine = app.state.frontend.engine.engine
                engine.clock = lambda: time.monotonic() + 1000  # every deadline has passed
                late = await client.post("/generate", json=body)
    assert late.status_code == 504
    histograms = collector.histograms()
    good, bad = sorted(
        histograms["gen_ai.server.request.duration"], key=lambda p: len(p.attributes)
    )
    assert attributes(good) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "crma",
        "gen_ai.request.model": base.name,
        "crma.enabled": False,
    }
    assert attributes(bad)["error.type"] == "deadline_exceeded"
    for name in ("time_to_first_token", "time_per_output_token"):
        (point,) = histograms[f"gen_ai.server.{name}"]
        assert point.count == 1
    assert list(point.explicit_bounds) == list(telemetry.PER_TOKEN)
    (served,) = (
        point
        for point in histograms["http.server.request.duration"]
        if attributes(point)["http.response.status_code"] == 200
    )
    assert attributes(served)["http.route"] == "/generate"


async def test_a_collector_that_does_not_answer_holds_up_no_end(
    base: BaseModel, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "CLOSE_SECONDS", 0.2)
    with collecting() as (collector, address):
        collector.answers.clear()
        async with tiny.serving(base, store.root, otlp_endpoint=address) as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await client.post("/generate", json={"prompt": SECRET, "max_tokens": 1})
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert collector.has_come.wait(10)
        collector.answers.set()
        for thread in threading.enumerate():
            if thread.name == "telemetry":
                thread.join(30)


async def test_nothing_is_traced_unless_it_is_asked_for(
    base: BaseModel, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI would send traces to what OpenTelemetry's own variables name."""
    with collecting() as (collector, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        async with tiny.serving(base, store.root) as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await client.post("/generate", json={"prompt": SECRET, "max_tokens": 1})
    assert not collector.has_come.is_set()


def test_the_endpoint_must_be_an_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write http://collector:4318"):
        Settings(store=tmp_path, otlp_endpoint="collector:4318")
