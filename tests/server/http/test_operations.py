"""Health, metrics, documentation, request ids and the access log."""

import asyncio
import json
import logging
import re
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from api import Serve, Served
from scripted_engine import ScriptedEngine

from crma.core.errors import StoreError
from crma.store.adapter_store import AdapterStore
from server import __version__
from server.engine.errors import EngineStopped
from server.engine.request import EngineStats, FinishReason
from server.http.log import Format
from server.service.frontend import COLD
from server.service.registry import Registry


async def test_the_server_is_ready_once_the_store_is_verified_and_a_step_has_run(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    verify = AdapterStore.verify

    def wait_and_verify(self: AdapterStore, **options: Any) -> list[StoreError]:
        assert go.wait(60)
        return verify(self, **options)

    monkeypatch.setattr(AdapterStore, "verify", wait_and_verify)
    served = await serve(wait=False)
    assert (await served.client.get("/healthz")).status_code == 200
    assert await probes(served) == [503] * 3
    early = await served.client.get("/readyz")
    assert early.status_code == 503
    assert early.json()["status"] == "not_ready"
    assert await served.error() == (503, "not_ready")
    go.set()
    await served.app.state.starting
    assert (await served.client.get("/readyz")).status_code == 200
    assert await probes(served) == [200] * 3
    assert (await served.generate()).status_code == 200
    served.app.state.frontend.draining = True
    assert (await served.client.get("/readyz")).json()["reason"] == "stopping"
    assert await probes(served) == [503] * 3
    assert await served.error() == (503, "draining")


@dataclass(eq=False)
class ColdEngine(ScriptedEngine):
    """Its first steps set `begun`, and end when `go` is set."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def warm_up(self) -> None:
        await super().warm_up()
        self.begun.set()
        await self.go.wait()


async def test_no_request_is_served_before_the_first_steps_have_passed(serve: Serve) -> None:
    """The engine on vLLM answered before its self-check had found that it mixes up adapters."""
    engine = ColdEngine()
    served = await serve(engine=engine, wait=False)
    await engine.begun.wait()
    early = await served.client.get("/readyz")
    assert (early.status_code, early.json()["reason"]) == (503, COLD)
    assert await served.error() == (503, "not_ready")
    engine.go.set()
    await served.app.state.starting
    assert (await served.client.get("/readyz")).status_code == 200
    assert (await served.generate()).status_code == 200


async def test_a_server_whose_engine_has_failed_is_not_ready_and_says_why(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve()
    failed = EngineStats(has_failed=True, failure="3 steps in a row failed", num_steps=9)
    monkeypatch.setattr(served.engine, "stats", lambda: failed)
    answer = await served.client.get("/readyz")
    assert answer.status_code == 503
    assert "3 steps in a row failed" in answer.json()["reason"]


async def test_a_server_whose_first_step_fails_ends(serve: Serve) -> None:
    ended: list[bool] = []
    engine = ScriptedEngine(ending=(FinishReason.ERROR, "the step failed"))
    engine.on_failure = lambda: ended.append(True)
    served = await serve(engine=engine)
    assert ended == [True]
    served.app.state.frontend.draining = True  # as `DrainingServer.fail` does
    answer = await served.client.get("/readyz")
    reason = "the server cannot start: the first step failed: the step failed"
    assert (answer.status_code, answer.json()["reason"]) == (503, reason)
    assert await served.error() == (503, "draining")


async def test_the_reason_of_a_start_that_fails_otherwise_is_in_the_log_only(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Probes need no key, and such an error may name files."""

    async def fail(_: Registry) -> None:
        raise OSError("/secret/place is gone")

    monkeypatch.setattr(Registry, "start", fail)
    served = await serve()
    answer = await served.client.get("/readyz")
    assert answer.json()["reason"] == "the server cannot start: its log has the reason"
    assert "/secret/place is gone" in caplog.text


async def test_one_task_that_cannot_serve_is_named_and_does_not_make_the_server_unready(
    serve: Serve, root: Path, tmp_path: Path
) -> None:
    """A load balancer that took the server out of rotation would stop the other tasks too."""
    shutil.copytree(root, tmp_path / "store")
    channels = tmp_path / "store" / "channels.json"
    served = await serve(store=tmp_path / "store")
    assert (await served.client.get("/readyz")).json()["problems"] == {}
    sound = channels.read_text()
    channels.write_text(sound.replace('"backbone": "v1"', '"backbone": null'))
    await served.app.state.frontend.registry.refresh()
    assert await served.error(task="medical") == (409, "no_backbone")
    assert (await served.generate(task="legal")).status_code == 200
    answer = await served.client.get("/readyz")
    trained_on = AdapterStore(tmp_path / "store").task("medical").manifest.backbone
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert list(answer.json()["problems"]) == ["medical"]
    assert trained_on in answer.json()["problems"]["medical"]
    assert "crma_tasks_unable 1.0" in await served.metrics()
    channels.write_text(sound)
    await served.app.state.frontend.registry.refresh()
    assert (await served.client.get("/readyz")).json()["problems"] == {}
    assert "crma_tasks_unable 0.0" in await served.metrics()


async def probes(served: Served) -> list[int]:
    """The statuses of vLLM's and SageMaker's probes, whose answers are empty."""
    responses = [
        await served.client.get("/health"),
        await served.client.get("/ping"),
        await served.client.post("/ping"),
    ]
    assert [response.content for response in responses] == [b""] * 3
    return [response.status_code for response in responses]


async def test_the_version_is_told(served: Served) -> None:
    assert (await served.client.get("/version")).json() == {"version": __version__}


async def test_metrics_are_labelled_by_adapter_and_crma(served: Served) -> None:
    await served.generate(task="medical", crma=True)
    await served.generate(task="legal")
    text = await served.metrics()
    successes = "crma_request_success_total"
    assert f'{successes}{{adapter="medical",crma="on",finished_reason="stop"}} 1.0' in text
    assert f'{successes}{{adapter="legal",crma="off",finished_reason="stop"}} 1.0' in text
    assert 'crma_time_to_first_token_seconds_count{adapter="medical",crma="on"} 1.0' in text
    assert 'crma_inter_token_latency_seconds_count{adapter="medical",crma="on"} 1.0' in text
    assert 'running_lora_adapters="legal,medical"' in text
    assert 'crma_adapter_resident{adapter="medical"} 1.0' in text
    bound = re.search(r"^crma_spectral_bound (\S+)", text, re.MULTILINE)
    assert float(bound.group(1)) >= 1.0


async def test_labels_belong_to_the_tasks_that_are_used_first(serve: Serve) -> None:
    """A scrape gave them to the first names of the alphabet, and hot tasks became `_other`."""
    served = await serve(max_adapter_labels=1)
    before = await served.metrics()
    assert set(re.findall(r'adapter_resident{adapter="([^"]*)"', before)) == {"_other"}
    for task in ("medical", "legal", "medical"):
        await served.generate(task=task)
        text = await served.metrics()
    counts = dict(re.findall(r'_latency_seconds_count{adapter="([^"]*)",crma="\w+"} (\S+)', text))
    assert counts == {"medical": "2.0", "_other": "1.0"}
    assert set(re.findall(r'adapter_resident{adapter="([^"]*)"', text)) == {"medical", "_other"}


async def test_the_number_of_labels_is_bounded_whatever_clients_ask_for(serve: Serve) -> None:
    served = await serve(max_adapter_labels=1)
    for task in ("legal", "medical", "nowhere"):
        await served.generate(task=task)
    await served.client.get("/some/path/of/a/client")
    text = await served.metrics()
    labels = set(re.findall(r'success_total{adapter="([^"]*)"', text))
    assert labels == {"base", "legal", "_other"}
    assert "nowhere" not in text
    assert 'crma_http_responses_total{route="unknown",status="404"} 1.0' in text


async def test_the_documentation_page_loads_nothing_from_other_hosts(served: Served) -> None:
    page = (await served.client.get("/docs")).text
    assert "openapi.json" in page
    assert re.search(r"https?://", page) is None
    for kind in ("js", "css"):
        address = re.findall(rf'"([^"]+[.]{kind})"', page)[0]
        assert (await served.client.get(address)).status_code == 200


async def test_the_openapi_document_describes_every_route_and_answer(served: Served) -> None:
    schema = (await served.client.get("/openapi.json")).json()
    generate = schema["paths"]["/generate"]["post"]
    statuses = (200, 400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504)
    assert set(generate["responses"]) == {str(status) for status in statuses}
    assert "lineage_mismatch" in generate["responses"]["409"]["description"]
    assert schema["components"]["schemas"]["GenerateRequest"]["examples"][0]["task"] == "medical"
    for path in schema["paths"].values():
        assert all(operation["description"] for operation in path.values())


async def test_a_plain_request_id_comes_back_and_any_other_is_replaced(served: Served) -> None:
    async def answered(sent: str) -> str:
        response = await served.client.get("/healthz", headers={"X-Request-Id": sent})
        return response.headers["X-Request-Id"]

    assert await answered("abc-1.2") == "abc-1.2"
    for sent in ("", "a b", "x" * 65, "a\tb"):
        assert re.fullmatch(r"[0-9a-f]{32}", await answered(sent))


async def test_the_access_log_has_the_request_id_and_digest_and_never_the_prompt(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for body in ({}, {"task": "medical", "crma": True}, {"temperature": -1}):
        await served.generate(prompt="my secret", **body)
    served.engine.refusal = ValueError("inside")
    await served.generate(prompt="my secret")
    access = [record for record in caplog.records if record.name == "server.access"]
    lines = [json.loads(Format("json").format(record)) for record in access]
    assert [line["status"] for line in lines] == [200, 200, 422, 500]
    assert lines[1]["task_digest"] == served.engine.requests[-1].selection.task_digest
    assert lines[1]["crma"] is True
    assert lines[1]["path"] == "/generate"
    request_ids = {line["request_id"] for line in lines}
    assert len(request_ids) == 4
    texts = [Format("text").format(record) for record in caplog.records]
    everything = [*texts, *(Format("json").format(record) for record in caplog.records)]
    for request_id in request_ids:
        assert f"request_id={request_id}" in "\n".join(texts)
    assert any("Traceback" in line and "inside" in line for line in everything)
    assert not any("secret" in line for line in everything)


@pytest.mark.parametrize("stream", [False, True])
async def test_of_several_prompts_one_that_is_refused_at_the_end_says_that_others_may_have_run(
    served: Served, stream: bool
) -> None:
    """A client repeats what was refused, and may not repeat what has run."""
    served.engine.refusal = EngineStopped("end")
    for prompt, code in (("a", "draining"), (["a", "b"], "server_stopped")):
        asked = {"model": "base", "prompt": prompt, "stream": stream}
        answer = await served.client.post("/v1/completions", json=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
