"""Health, metrics, documentation, request ids and logs."""

import json
import logging
import re
import threading
from typing import Any

import pytest
from api import Serve, Served

from crma.core.errors import StoreError
from crma.store.adapter_store import AdapterStore
from server.http.log import Format


async def test_ready_once_the_store_is_verified_and_a_step_ran(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, verify = threading.Event(), AdapterStore.verify

    def held(self: AdapterStore, **options: Any) -> list[StoreError]:
        assert go.wait(60)
        return verify(self, **options)

    monkeypatch.setattr(AdapterStore, "verify", held)
    served = await serve(wait=False)
    assert (await served.client.get("/healthz")).status_code == 200
    early = await served.client.get("/readyz")
    assert (early.status_code, early.json()["status"]) == (503, "not_ready")
    assert await served.error() == (503, "not_ready")
    go.set()
    await served.app.state.starting
    assert (await served.client.get("/readyz")).status_code == 200
    served.engine.requests.clear()
    assert (await served.client.get("/readyz")).json()["reason"] == "no step has run yet"
    assert (await served.generate()).status_code == 200
    served.app.state.frontend.draining = True
    assert (await served.client.get("/readyz")).json()["reason"] == "stopping"
    assert await served.error() == (503, "draining")


async def test_metrics_are_by_adapter_and_crma(served: Served) -> None:
    await served.generate(task="medical", crma=True)
    await served.generate(task="legal")
    text = await served.metrics()
    assert (
        'crma_request_success_total{adapter="medical",crma="on",finished_reason="stop"} 1.0' in text
    )
    assert (
        'crma_request_success_total{adapter="legal",crma="off",finished_reason="stop"} 1.0' in text
    )
    assert 'crma_time_to_first_token_seconds_count{adapter="medical",crma="on"} 1.0' in text
    assert 'crma_inter_token_latency_seconds_count{adapter="medical",crma="on"} 1.0' in text
    assert 'running_lora_adapters="legal,medical"' in text
    assert 'crma_adapter_resident{adapter="medical"} 1.0' in text
    assert float(re.search(r"^crma_spectral_bound (\S+)", text, re.MULTILINE).group(1)) >= 1.0


async def test_labels_are_bounded_whatever_clients_ask_for(serve: Serve) -> None:
    served = await serve(max_adapter_labels=1)
    for task in ("legal", "medical", "nowhere"):
        await served.generate(task=task)
    await served.client.get("/some/path/of/a/client")
    text = await served.metrics()
    assert set(re.findall(r'success_total{adapter="([^"]*)"', text)) == {"legal", "_other"}
    assert "nowhere" not in text
    assert 'crma_http_responses_total{route="unknown",status="404"} 1.0' in text


async def test_the_documentation_needs_nothing_from_elsewhere(served: Served) -> None:
    page = (await served.client.get("/docs")).text
    assert ("openapi.json" in page, re.search(r"https?://", page)) == (True, None)
    script, style = (re.findall(rf'"([^"]+[.]{kind})"', page)[0] for kind in ("js", "css"))
    assert [(await served.client.get(needed)).status_code for needed in (script, style)] == [
        200,
        200,
    ]
    schema = (await served.client.get("/openapi.json")).json()
    generate = schema["paths"]["/generate"]["post"]
    assert set(generate["responses"]) == {
        "200",
        *map(str, (400, 401, 404, 409, 413, 422, 429, 500, 503, 504)),
    }
    assert "lineage_mismatch" in generate["responses"]["409"]["description"]
    assert schema["components"]["schemas"]["GenerateRequest"]["examples"][0]["task"] == "medical"
    assert all(op["description"] for path in schema["paths"].values() for op in path.values())


async def test_a_request_id_comes_back_if_it_is_plain(served: Served) -> None:
    for sent in ("abc-1.2", "", "a b", "x" * 65, "a\tb"):
        answered = (await served.client.get("/healthz", headers={"X-Request-Id": sent})).headers[
            "X-Request-Id"
        ]
        assert answered == sent if sent == "abc-1.2" else re.fullmatch(r"[0-9a-f]{32}", answered)


async def test_the_log_has_id_and_digest_and_never_the_prompt(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for body in ({}, {"task": "medical", "crma": True}, {"temperature": -1}):
        await served.generate(prompt="my secret", **body)
    served.engine.refusal = ValueError("inside")
    await served.generate(prompt="my secret")
    lines = [
        json.loads(Format("json").format(record))
        for record in caplog.records
        if record.name == "server.access"
    ]
    assert [line["status"] for line in lines] == [200, 200, 422, 500]
    assert lines[1]["task"] == served.engine.requests[-1].selection.task_digest
    assert (lines[1]["crma"], lines[1]["path"]) == (True, "/generate")
    assert len({line["request_id"] for line in lines}) == 4
    everything = [
        Format(form).format(record) for record in caplog.records for form in ("json", "text")
    ]
    assert all(f"request_id={line['request_id']}" in "\n".join(everything) for line in lines)
    assert any("Traceback" in line and "inside" in line for line in everything)
    assert not any("secret" in line for line in everything)
