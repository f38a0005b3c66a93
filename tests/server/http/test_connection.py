"""server.http.connection: what clients may do to a port, over real sockets."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from socket_client import Client
from starlette.types import Receive, Scope, Send

from server.http.connection import Connection, ConnectionLimits, Door
from server.http.refusals import DISPLACED, REASONS, Refusals
from server.service.metrics import Metrics

LIMITS = ConnectionLimits(max_head_bytes=4096, head_timeout_s=0.2, stall_timeout_s=0.2)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
NEVER = 60.0
LARGE = 32 << 20  # bytes of an answer: more than the system keeps for a client


class App:
    """Answers with the path once `go` is set; /large with a lot."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.num_asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.num_asked += 1
        await self.go.wait()
        body = b"x" * LARGE if scope["path"] == "/large" else scope["path"].encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Port:
    """A server on a port of its own."""

    app: App
    door: Door
    connect: Callable[[], Any]
    metrics: Metrics

    def refused(self) -> dict[str, float]:
        """How many connections were refused, by reason, but for those with none."""
        samples = self.metrics.connections_refused.collect()[0].samples
        return {each.labels["reason"]: each.value for each in samples if each.value}


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers with some of the limits changed; yields what starts them."""
    async with AsyncExitStack() as stack:

        async def start(*, max_connections: int = 100, **changes: Any) -> Port:
            keep_alive = changes.pop("keep_alive_s", NEVER)
            limits = ConnectionLimits(**{**LIMITS.__dict__, **changes})
            listening = socket.create_server(("127.0.0.1", 0))
            number = listening.getsockname()[1]
            metrics = Metrics(CollectorRegistry())
            door = Door(max_connections, Refusals(metrics))
            app = App()
            config = uvicorn.Config(
                app,
                http=partial(Connection, limits=limits, doors={number: door}),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                timeout_keep_alive=keep_alive,  # type: ignore[arg-type]
                timeout_graceful_shutdown=0,
            )
            server = uvicorn.Server(config)
            config.load()
            server.lifespan = config.lifespan_class(config)
            await server.startup(sockets=[listening])
            stack.push_async_callback(server.shutdown, sockets=[listening])

            async def connect() -> Client:
                client = Client(*await asyncio.open_connection("127.0.0.1", number))
                stack.callback(client.writer.close)
                return client

            return Port(app, door, connect, metrics)

        yield start


async def is_served(port: Port) -> bool:
    """Whether a new client gets its answer."""
    client = await port.connect()
    await client.send(GET)
    return bool(await client.answer() == (200, "/"))


# Time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA", GET[:-2]]
)
async def test_half_a_head_is_answered_408_after_its_time(serve: Serve, part: bytes) -> None:
    """It stayed open for ever."""
    port = await serve()
    client = await port.connect()
    await client.send(part)
    status, body = await client.answer()
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert body["error"]["field"] == "headers"
    assert body["error"]["allowed"] == "<= 0.2 s"
    assert await client.end() == b""


async def test_a_client_that_sends_nothing_is_closed_without_a_word(serve: Serve) -> None:
    client = await (await serve()).connect()
    assert await client.end() == b""


async def test_sending_slowly_gains_no_time(serve: Serve) -> None:
    port = await serve()
    client = await port.connect()
    for byte in GET[:-2]:
        if client.reader._buffer:  # type: ignore[attr-defined]
            break
        await client.send(bytes([byte]))
        await asyncio.sleep(0.02)
    assert (await client.answer())[0] == 408


async def test_a_client_that_still_sends_can_read_why_it_was_refused(serve: Serve) -> None:
    """Closing while something was on its way reset the connection, and the answer was lost."""
    client = await (await serve(stall_timeout_s=NEVER)).connect()
    await client.send(b"GET / HTTP/1.1\r\nX: " + b"x" * (4 << 20))
    assert (await client.answer())[0] == 431
    await client.send(b"x" * (4 << 20))
    assert await client.end() == b""


async def test_a_client_that_was_refused_cannot_stay(serve: Serve) -> None:
    port = await serve()
    client = await port.connect()
    await client.send(b"no HTTP\r\n\r\n")
    assert (await client.answer())[0] == 400
    async with asyncio.timeout(10):
        while port.door.num_open:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("between", [b"", b"\r\n"], ids=["nothing", "an empty line"])
async def test_an_idle_connection_is_closed(serve: Serve, between: bytes) -> None:
    """An empty line ended uvicorn's own time-out, and nothing began another."""
    port = await serve(keep_alive_s=0.2)
    client = await port.connect()
    for _ in range(3):
        await client.send(GET)
        assert await client.answer() == (200, "/")
    await client.send(between)
    assert await client.end() == b""


async def test_half_a_body_after_the_answer_is_closed_after_its_time(serve: Serve) -> None:
    client = await (await serve()).connect()
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
    assert await client.answer() == (200, "/")
    assert await client.end() == b""


async def test_the_rest_of_a_body_after_the_answer_is_passed_over(serve: Serve) -> None:
    client = await (await serve(stall_timeout_s=NEVER)).connect()
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
    assert await client.answer() == (200, "/")
    await client.send(b"67890" + GET)
    assert await client.answer() == (200, "/")


async def test_a_request_that_takes_long_to_answer_is_not_closed(serve: Serve) -> None:
    port = await serve()
    port.app.go.clear()
    client = await port.connect()
    await client.send(GET)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await client.answer()
    port.app.go.set()
    assert await client.answer() == (200, "/")


async def test_half_a_head_behind_a_request_waits_for_the_answer_first(serve: Serve) -> None:
    port = await serve()
    port.app.go.clear()
    client = await port.connect()
    await client.send(GET + b"GET /2")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await client.answer()
    port.app.go.set()
    assert await client.answer() == (200, "/")
    assert (await client.answer())[0] == 408


async def test_an_answer_that_nobody_reads_is_cut_off_after_its_time(serve: Serve) -> None:
    port = await serve()
    client = await port.connect()
    client.writer.transport.pause_reading()
    await client.send(GET.replace(b"/ ", b"/large "))
    async with asyncio.timeout(10):
        while port.door.num_open or not port.app.num_asked:
            await asyncio.sleep(0.01)


async def test_requests_one_behind_the_other_are_answered_in_order(serve: Serve) -> None:
    client = await (await serve()).connect()
    await client.send(b"".join(GET.replace(b"/ ", b"/%d " % i) for i in range(5)))
    assert [await client.answer() for _ in range(5)] == [(200, f"/{i}") for i in range(5)]


# Size ----------------------------------------------------------------------------------------

TOO_LARGE = {
    "a header": b"GET / HTTP/1.1\r\nA: " + b"x" * 5000 + b"\r\n\r\n",
    "a header without end": b"GET / HTTP/1.1\r\nA: " + b"x" * 400_000,
    "a path": b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"A:\r\n" * 200 + b"\r\n",
}


@pytest.mark.parametrize("head", TOO_LARGE.values(), ids=TOO_LARGE)
async def test_a_head_over_the_limit_is_answered_431(serve: Serve, head: bytes) -> None:
    """128 MiB of headers were accepted."""
    port = await serve(head_timeout_s=NEVER)
    client = await port.connect()
    await client.send(head[:3000])
    async with asyncio.timeout(10):
        while not any(each._reads_head for each in port.door.waiting):
            await asyncio.sleep(0.01)
    for start in range(3000, len(head), 65536):
        client.writer.write(head[start : start + 65536])
    status, body = await client.answer()
    assert (status, body["error"]["code"]) == (431, "head_too_large")
    assert body["error"]["field"] == "headers"
    assert body["error"]["allowed"].startswith("<= 4096 bytes")
    assert port.app.num_asked == 0
    assert port.refused() == {"head_too_large": 1}
    assert await is_served(port)


async def test_trailers_over_the_limit_are_cut_off(serve: Serve) -> None:
    port = await serve(head_timeout_s=NEVER)
    port.app.go.clear()
    client = await port.connect()
    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
    await client.send(b"A: " + b"x" * 5000 + b"\r\n\r\n")
    assert await client.end() == b""


async def test_a_head_at_the_limit_is_served_again_and_again(serve: Serve) -> None:
    client = await (await serve()).connect()
    head = b"GET / HTTP/1.1\r\nA: " + b"x" * 3900 + b"\r\n\r\n"
    for _ in range(3):
        await client.send(head)
        assert await client.answer() == (200, "/")


async def test_what_is_no_http_is_a_400_as_all_errors_are(serve: Serve) -> None:
    client = await (await serve()).connect()
    await client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    status, body = await client.answer()
    assert (status, body["error"]["code"]) == (400, "malformed_request")
    assert await client.end() == b""


async def test_every_refusal_is_counted_by_reason_and_logged_now_and_then(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Operators saw nothing of them, neither in a metric nor in the log."""
    port = await serve(max_connections=1)
    assert {*REASONS} == {
        each.labels["reason"] for each in port.metrics.connections_refused.collect()[0].samples
    }
    for head in (TOO_LARGE["a header"], TOO_LARGE["a path"], GET[:-2], b"\x16\x03"):
        client = await port.connect()
        await client.send(head)
        await client.answer()
    idle = await port.connect()
    port.app.go.clear()
    busy = await port.connect()
    await busy.send(GET)
    assert await idle.end() == b""
    async with asyncio.timeout(10):
        while not port.app.num_asked:
            await asyncio.sleep(0.01)
    await (await port.connect()).answer()
    counts = {"head_too_large": 2, "request_timeout": 1, "malformed_request": 1}
    assert port.refused() == {**counts, DISPLACED: 1, "too_many_connections": 1}
    port.app.go.set()
    await busy.answer()
    lines = [each.message for each in caplog.records if "refused" in each.message]
    assert len(lines) == 5
    assert "connections refused: displaced: 1 since the last line, from 127.0.0.1" in lines


# Number ---------------------------------------------------------------------------------------


async def test_the_client_that_waits_longest_makes_room_for_a_new_one(serve: Serve) -> None:
    """1,100 idle connections left no descriptor for a probe of health."""
    port = await serve(max_connections=3, head_timeout_s=NEVER)
    idle = [await port.connect() for _ in range(3)]
    await idle[1].send(GET)
    assert await idle[1].answer() == (200, "/")
    new = await port.connect()
    await new.send(GET)
    assert await new.answer() == (200, "/")
    assert await idle[0].end() == b""
    await idle[1].send(GET)
    assert await idle[1].answer() == (200, "/")
    assert port.door.num_open == 3


@pytest.mark.parametrize("sent", [b"GET /", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n1"])
async def test_half_a_request_makes_room_for_a_new_one(serve: Serve, sent: bytes) -> None:
    port = await serve(max_connections=1, head_timeout_s=NEVER, stall_timeout_s=NEVER)
    port.app.go.clear()
    half = await port.connect()
    await half.send(sent)
    whole = await port.connect()
    await whole.send(GET)
    assert await half.end() == b""
    port.app.go.set()
    assert await whole.answer() == (200, "/")


async def test_while_all_are_answered_one_more_is_refused_at_once(serve: Serve) -> None:
    port = await serve(max_connections=2)
    port.app.go.clear()
    busy = [await port.connect() for _ in range(2)]
    for client in busy:
        await client.send(GET)
    async with asyncio.timeout(10):
        while port.app.num_asked < 2:
            await asyncio.sleep(0.01)
    refused = await port.connect()
    status, body = await refused.answer()
    assert (status, body["error"]["code"]) == (503, "too_many_connections")
    assert body["error"]["allowed"] == "<= 2 at once"
    assert await refused.end() == b""
    port.app.go.set()
    for client in busy:
        assert await client.answer() == (200, "/")
    assert await is_served(port)


async def test_clients_that_reset_their_connections_leave_nothing_behind(serve: Serve) -> None:
    port = await serve(head_timeout_s=NEVER)
    for sent in (b"", b"GET /", GET):
        client = await port.connect()
        await client.send(sent)
        linger = struct.pack("ii", 1, 0)
        sock = client.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.writer.transport.abort()
    async with asyncio.timeout(10):
        while port.door.num_open:
            await asyncio.sleep(0.01)
    assert not port.door.waiting
    assert await is_served(port)
