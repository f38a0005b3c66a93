"""server.loading: what clients get while a model loads."""

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from server.listener import listen, protocol
from server.loading import answering
from server.service.metrics import Metrics
from server.settings import Settings


@pytest.fixture
def settings() -> Settings:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Settings(port=free.getsockname()[1])


@pytest.fixture
def sockets(settings: Settings) -> Iterator[list[socket.socket]]:
    with ExitStack() as opened:
        yield [opened.enter_context(each) for each in listen(settings)]


@pytest.fixture
def client(settings: Settings) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{settings.port}", timeout=10) as opened:
        yield opened


def test_it_lives_and_cannot_serve_yet(
    settings: Settings, sockets: list[socket.socket], client: httpx.Client
) -> None:
    connection = protocol(settings, 100, Metrics(CollectorRegistry()))
    with answering(sockets, connection):
        alive = client.get("/healthz")
        assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["reason"] == "loading"
        assert ready.headers["Retry-After"] == "1"
        for path in ("/health", "/ping"):
            assert (client.get(path).status_code, client.get(path).content) == (503, b"")


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/nowhere", "/"])
def test_every_other_route_says_when_to_try_again(
    settings: Settings, sockets: list[socket.socket], client: httpx.Client, path: str
) -> None:
    connection = protocol(settings, 100, Metrics(CollectorRegistry()))
    with answering(sockets, connection):
        answer = client.post(path, json={"prompt": "Hi " * 10_000})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "loading"
    assert answer.headers["Retry-After"] == "1"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_connections_have_their_limits(
    settings: Settings, sockets: list[socket.socket], client: httpx.Client
) -> None:
    connection = protocol(settings, 100, Metrics(CollectorRegistry()))
    with answering(sockets, connection):
        answer = client.get("/readyz", headers={"X-Large": "x" * settings.max_head_bytes})
    assert answer.status_code == 431


def test_the_sockets_stay_open_for_the_next_server(
    settings: Settings,
    sockets: list[socket.socket],
    client: httpx.Client,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two servers here, one after the other, and a client that keeps its connection."""
    caplog.set_level(logging.INFO)
    connection = protocol(settings, 100, Metrics(CollectorRegistry()))
    for _ in range(2):
        with answering(sockets, connection):
            assert client.get("/healthz").status_code == 200
    assert "server process" not in caplog.text


def test_the_next_server_need_not_wait_until_the_thread_has_ended(
    settings: Settings,
    sockets: list[socket.socket],
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """uvicorn takes a tenth of a second and more to end. Who connects meanwhile is the next
    server's."""
    connection = protocol(settings, 100, Metrics(CollectorRegistry()))
    released = threading.Event()
    end = uvicorn.Server.shutdown

    async def end_late(server: uvicorn.Server, **given: Any) -> None:
        await asyncio.to_thread(released.wait, 5)
        await end(server, **given)

    monkeypatch.setattr(uvicorn.Server, "shutdown", end_late)
    with answering(sockets, connection):
        assert client.get("/healthz").status_code == 200
    running = {each.name: each for each in threading.enumerate()}
    address = ("127.0.0.1", settings.port)
    with socket.create_connection(address) as caller, sockets[0].accept()[0] as accepted:
        assert accepted.getpeername() == caller.getsockname()
    released.set()
    running["loading"].join()


def test_an_error_while_loading_ends_the_answers(
    settings: Settings, sockets: list[socket.socket], client: httpx.Client
) -> None:
    connection = protocol(settings, 100, Metrics(CollectorRegistry()))

    def load_in_vain() -> None:
        with answering(sockets, connection):
            assert client.get("/healthz").status_code == 200
            raise LookupError

    with pytest.raises(LookupError):
        load_in_vain()
    for each in sockets:
        each.close()
    with pytest.raises(httpx.ConnectError):
        client.get("/healthz")
