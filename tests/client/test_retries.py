"""Retries: only what cannot have run, or only reads; never sooner than the server says."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from crma_client import AsyncClient, Client, CrmaClientError, errors
from crma_client.retries import Retries

ANSWER = {
    **{"id": "gen-1", "index": 0, "text": "A", "finish_reason": "stop", "task": None},
    **{"crma": False, "usage": {}, "timings": {}, "provenance": {}},
}


def refusal(status: int, code: str | None = None, retry_after: str | None = None) -> httpx.Response:
    body = {"error": {"code": code, "message": "no"}} if code else None
    headers = {"Retry-After": retry_after} if retry_after else {}
    return httpx.Response(status, json=body, headers=headers)


class Server:
    """Gives one outcome after the other, the last of them for ever, and counts the requests."""

    def __init__(self, *outcomes: httpx.Response | Exception) -> None:
        self.outcomes = list(outcomes)
        self.num_requests = 0
        self.transport = httpx.MockTransport(self.answer)

    def answer(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.num_requests += 1
        outcome = self.outcomes[min(self.num_requests, len(self.outcomes)) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which take no time."""
    found: list[float] = []

    async def wait(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(time, "sleep", found.append)
    monkeypatch.setattr(asyncio, "sleep", wait)
    return found


def fine() -> httpx.Response:
    return httpx.Response(200, json=ANSWER)


REPEATED: list[Callable[[], Any]] = [
    lambda: httpx.ConnectError("refused"),
    lambda: httpx.ConnectTimeout("slow"),
    lambda: refusal(429, "queue_full", "1"),
    lambda: refusal(503, "loading", "1"),
    lambda: refusal(503, "not_ready", "1"),
    lambda: refusal(503, "too_many_connections", "1"),
    lambda: refusal(503, "draining", "1"),
]
NOT_REPEATED: list[Callable[[], Any]] = [
    lambda: httpx.ReadError("broke"),
    lambda: httpx.ReadTimeout("slow"),
    lambda: httpx.WriteError("broke"),
    lambda: httpx.RemoteProtocolError("closed"),
    lambda: refusal(500, "generation_failed"),
    lambda: refusal(502),
    lambda: refusal(503),
    lambda: refusal(503, "server_stopped"),
    lambda: refusal(504, "deadline_exceeded"),
]


@pytest.mark.parametrize("outcome", REPEATED)
async def test_what_cannot_have_run_is_sent_again(
    outcome: Callable[[], Any], waits: list[float]
) -> None:
    server = Server(outcome(), outcome(), fine())
    with Client(transport=server.transport) as client:
        assert client.generate("hi").text == "A"
    assert server.num_requests == 3
    server = Server(outcome(), outcome(), fine())
    async with AsyncClient(transport=server.transport) as awaited:
        assert (await awaited.generate("hi")).text == "A"
    assert server.num_requests == 3
    assert len(waits) == 4


@pytest.mark.parametrize("outcome", NOT_REPEATED)
async def test_what_may_have_run_is_not_sent_again(
    outcome: Callable[[], Any], waits: list[float]
) -> None:
    server = Server(outcome(), fine())
    with Client(transport=server.transport) as client, pytest.raises(CrmaClientError):
        client.generate("hi")
    assert server.num_requests == 1
    server = Server(outcome(), fine())
    async with AsyncClient(transport=server.transport) as awaited:
        with pytest.raises(CrmaClientError):
            await awaited.ablation(question_set="public")
    assert (server.num_requests, waits) == (1, [])


def test_a_stream_that_has_begun_is_not_begun_again(waits: list[float]) -> None:
    server = Server(httpx.Response(200, content=b'event: token\ndata: {"index": 0, "text": "a"}\n'))
    with (
        Client(transport=server.transport) as client,
        pytest.raises(errors.ProtocolError),
        client.stream("hi") as stream,
    ):
        list(stream)
    assert (server.num_requests, waits) == (1, [])


def test_a_stream_that_was_refused_is_opened_again(waits: list[float]) -> None:
    done = b'event: done\ndata: {"id": "g", "index": 0, "finish_reason": "stop", "crma": false, '
    done += b'"usage": {}, "timings": {}, "provenance": {}}\n\n'
    server = Server(refusal(429, "queue_full", "1"), httpx.Response(200, content=done))
    with Client(transport=server.transport) as client, client.stream("hi") as stream:
        assert list(stream) == []
    assert (stream.result.id, server.num_requests, len(waits)) == ("g", 2, 1)


@pytest.mark.parametrize(
    "outcome",
    [
        lambda: httpx.ReadError("broke"),
        lambda: refusal(502),
        lambda: refusal(503),
        lambda: refusal(503, "draining", "1"),
        lambda: refusal(503, "server_stopped"),
    ],
)
def test_what_only_reads_is_sent_again_whatever_happened(
    outcome: Callable[[], Any], waits: list[float]
) -> None:
    server = Server(outcome(), httpx.Response(200, json={"tasks": []}))
    with Client(transport=server.transport) as client:
        assert client.adapters() == {"tasks": []}
    assert (server.num_requests, len(waits)) == (2, 1)


def test_a_read_that_took_too_long_once_does_not_take_so_long_again(waits: list[float]) -> None:
    server = Server(httpx.ReadTimeout("slow"))
    with Client(transport=server.transport) as client, pytest.raises(errors.TimedOut):
        client.adapters()
    assert server.num_requests == 1


@pytest.mark.parametrize("retries", [0, 3])
def test_a_server_that_stays_full_is_an_error_after_so_many_retries(
    retries: int, waits: list[float]
) -> None:
    server = Server(refusal(429, "queue_full", "2"))
    with (
        Client(retries=retries, transport=server.transport) as client,
        pytest.raises(errors.Overloaded, check=lambda error: error.retry_after == 2),
    ):
        client.generate("hi")
    assert (server.num_requests, len(waits)) == (1 + retries, retries)
    assert all(2 <= wait <= 2.5 for wait in waits)


def full(retry_after: float | None) -> errors.Overloaded:
    return errors.Overloaded("full", status=429, retry_after=retry_after)


def test_waits_grow_and_differ_but_never_end_before_the_server_says() -> None:
    retries = Retries(5, first_wait_s=1, max_wait_s=6)
    for attempt, longest in enumerate((1, 2, 4, 6, 6)):
        waits = {retries.wait(attempt, "POST", full(None)) for _ in range(20)}
        assert len(waits) > 1
        assert all(wait is not None and longest / 2 <= wait <= longest for wait in waits)
    told = {retries.wait(0, "POST", full(5)) for _ in range(20)}
    assert len(told) > 1
    assert all(wait is not None and 5 <= wait <= 6 for wait in told)
    assert retries.wait(0, "POST", full(7)) is None  # rather an error than so long a silence
    assert retries.wait(5, "POST", full(None)) is None
