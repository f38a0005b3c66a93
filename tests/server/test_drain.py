"""server.drain: the end of a server, over HTTP, on a scripted engine."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import uvicorn
from api import BASE
from prometheus_client import CollectorRegistry
from scripted_engine import ScriptedEngine

from crma.models.model_shape import ModelShape
from crma.models.prompts import BASE_TEMPLATE
from crma.store.adapter_store import AdapterStore
from server.app import create_app
from server.drain import CANCEL_SECONDS, DrainingServer
from server.engine.inference_engine import Outputs
from server.engine.request import Request
from server.listener import addresses, listen, protocol
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.settings import Settings

STREAM = {"prompt": "Hi", "stream": True}
DRAINING = "draining"  # refused: nothing has run
STOPPED = "server_stopped"  # it had begun


@dataclass(eq=False)
class HeldEngine(ScriptedEngine):
    """Sends a first token, and the second once `go` is set or the request was aborted."""

    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def _outputs(self, request: Request) -> Outputs:
        number = 0
        async for output in super()._outputs(request):
            yield output
            number += 1
            while request.id != "warm-up" and number == 1 and not self.go.is_set():
                if self._early_ending(request) is not None:
                    break
                await asyncio.sleep(0.01)


@dataclass
class Running:
    """A server that runs.

    ended: the task that ends with it.
    """

    client: httpx.AsyncClient
    engine: HeldEngine
    frontend: Frontend
    ended: asyncio.Task[None]


Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """What starts a server with settings; leaving its context ends it."""

    @asynccontextmanager
    async def running(**options: Any) -> AsyncIterator[Running]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = {"store": tiny.filled_store(tmp_path / "store", BASE).root, "port": port}
        settings = Settings(**given, evaluations=tmp_path / "kept", **options)
        engine = HeldEngine()
        metrics = Metrics(CollectorRegistry(), max_adapter_labels=4)
        registry = Registry(
            store=AdapterStore(settings.store),
            base=BASE,
            engine=engine,
            base_format=BASE_TEMPLATE,
            metrics=metrics,
            shape=ModelShape.of(tiny.injection().model),
        )
        frontend = Frontend(settings, engine, registry, tiny.tokenizer(), metrics)
        app = create_app(frontend)
        config = uvicorn.Config(
            app,
            http=protocol(settings, 100, metrics),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            timeout_graceful_shutdown=CANCEL_SECONDS,
        )
        sockets = listen(settings)
        ended = asyncio.create_task(DrainingServer(config, frontend).serve(sockets))
        async with httpx.AsyncClient(base_url=addresses(sockets), timeout=10) as client:
            assert (await client.get("/healthz")).status_code == 200
            await app.state.starting
            try:
                yield Running(client, engine, frontend, ended)
            finally:
                engine.go.set()
                if not ended.done():
                    if not frontend.draining:
                        os.kill(os.getpid(), signal.SIGTERM)
                    await asyncio.wait_for(ended, 20)

    return running


async def begin(running: Running, **body: Any) -> asyncio.Task[httpx.Response]:
    """A request that is in the engine."""
    num_before = len(running.engine.requests)
    sent = running.client.post("/generate", json={"prompt": "Hi", **body})
    task = asyncio.create_task(sent)
    while len(running.engine.requests) == num_before:
        await asyncio.sleep(0.01)
    return task


def stop(sig: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), sig)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_a_server_that_runs_longer_than_a_body_may_take_still_ends_in_order(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The time of a body ran out for the app's own end: it failed, and closed nothing."""
    async with start(body_timeout_s=0.1, drain_grace_s=0) as running:
        started = time.monotonic()
        while time.monotonic() < started + 0.5:
            assert (await running.client.get("/readyz")).status_code == 200
    assert running.engine.closed
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_readyz_is_503_first_and_new_requests_get_503_while_the_port_is_open(
    start: Start,
) -> None:
    """Connections were refused from the signal on."""
    async with start(drain_grace_s=1) as running:
        stop()
        await asyncio.sleep(0)
        ready = await running.client.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "stopping")
        assert (await running.client.get("/healthz")).status_code == 200
        refused = await running.client.post("/generate", json={"prompt": "Hi"})
        assert code(refused) == (503, DRAINING)
        assert refused.headers["retry-after"] == "1"
        async with asyncio.timeout(10):
            await running.ended
        with pytest.raises(httpx.ConnectError):
            await running.client.get("/healthz")


async def test_running_requests_finish_while_the_port_is_open(start: Start) -> None:
    async with start(drain_grace_s=0) as running:
        whole = await begin(running)
        stop()
        await asyncio.sleep(0.3)  # longer than a tick of the server
        assert not running.ended.done()
        assert code(await running.client.post("/generate", json={"prompt": "x"})) == (503, DRAINING)
        running.engine.go.set()
        answer = await whole
        assert answer.json()["text"] == "one two"
        async with asyncio.timeout(10):
            await running.ended


async def test_past_the_limit_streams_end_with_an_error_event(start: Start) -> None:
    """They were cut off without one."""
    async with start(drain_grace_s=0, drain_timeout_s=0.2) as running:
        stream = running.client.stream("POST", "/generate", json=STREAM)
        async with stream as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "event: token"
            stop()
            rest = [line async for line in lines]
        assert "event: error" in rest
        error = json.loads(rest[rest.index("event: error") + 1].removeprefix("data: "))
        assert error["error"]["code"] == STOPPED
        async with asyncio.timeout(10):
            await running.ended


async def test_the_events_of_a_job_end_with_an_error_event_at_once(start: Start) -> None:
    """They ended without a word."""
    question = {"id": "1", "task": "medical", "question": "One?", "answers": ["x"]}
    body = {"questions": [question], "variants": ["base"], "background": True}
    async with start(drain_grace_s=0, drain_timeout_s=60) as running:
        job = (await running.client.post("/ablation", json=body)).json()
        async with running.client.stream("GET", f"{job['status_url']}/events") as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "event: progress"
            stop()
            rest = [line async for line in lines]
        error = json.loads(rest[rest.index("event: error") + 1].removeprefix("data: "))
        assert error["error"]["code"] == DRAINING
        async with asyncio.timeout(10):
            await running.ended


async def test_past_the_limit_what_waits_gets_503(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """It was a plain-text 500, and a traceback in the log."""
    async with start(drain_grace_s=0, drain_timeout_s=0.2) as running:
        waiting = [await begin(running) for _ in range(3)]
        question = {"id": "1", "task": "medical", "question": "One?", "answers": ["x"]}
        body = {"questions": [question], "variants": ["base"]}
        waiting.append(asyncio.create_task(running.client.post("/ablation", json=body)))
        while len(running.engine.requests) < 5:
            await asyncio.sleep(0.01)
        stop()
        for response in await asyncio.gather(*waiting):
            assert code(response) == (503, STOPPED)
            assert "retry-after" not in response.headers  # nobody should repeat it unasked
        async with asyncio.timeout(10):
            await running.ended
    assert not any(record.exc_info for record in caplog.records)


async def test_past_the_limit_what_the_engine_does_not_know_gets_503_too(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(drain_grace_s=0, drain_timeout_s=0.1) as running:
        asked = asyncio.Event()

        async def never(*_: Any, **__: Any) -> None:
            asked.set()
            await asyncio.Event().wait()

        monkeypatch.setattr("server.drain.END_SECONDS", 0.2)
        monkeypatch.setattr(running.frontend, "generation", never)
        sent = asyncio.create_task(running.client.post("/generate", json={"prompt": "Hi"}))
        await asked.wait()
        stop()
        assert code(await sent) == (503, STOPPED)
        async with asyncio.timeout(10):
            await running.ended


async def test_at_a_terminal_there_is_no_grace(start: Start) -> None:
    async with start(drain_grace_s=60) as running:
        stop(signal.SIGINT)
        async with asyncio.timeout(10):
            await running.ended


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once(
    start: Start, second: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    async with start(drain_grace_s=0.2) as running:
        stop()
        await asyncio.sleep(0)
        stop(second)
        await asyncio.sleep(0)
        assert codes == [128 + second]
        await running.ended
