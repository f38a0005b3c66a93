"""Load on an OpenAI-compatible server: streamed completions of token ids.

So many requests are in flight, or they arrive at random.

The generator shares the cores with the server it measures. While the load runs, it only records
when bytes arrived, which takes a tenth of what httpx takes for each token; it parses them
afterwards.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import h11

from bench.metrics import RequestResult
from bench.workloads import Request, Workload

Ask = Callable[[Request], Awaitable[None]]
TIMEOUT_S = 300.0
LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass
class RawStream:
    """A streamed response before parsing: each line with the time at which it was complete."""

    sent_at: float
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


def run(url: str, workload: Workload, seed: str) -> tuple[list[RequestResult], float]:
    """Put a workload on a server.

    Args:
        url: address of the server.
        workload: the requests.
        seed: prompts, lengths and times of arrival are drawn from it.

    Returns:
        The result of every request, a failed one with its error; and the seconds that all took.
    """
    return asyncio.run(_run(url, workload, seed))


async def _run(url: str, workload: Workload, seed: str) -> tuple[list[RequestResult], float]:
    requests = workload.requests(seed)
    exchanges: list[tuple[Request, Exchange]] = []

    async def ask(request: Request) -> None:
        exchange = Exchange(url, request)
        exchanges.append((request, exchange))
        await exchange.run()

    begin = time.perf_counter()
    if workload.arrival_share is None:
        await _keep_in_flight(requests, workload.concurrency, ask)
    else:
        await _send_at(workload.arrival_times(seed), requests, ask)
    duration = time.perf_counter() - begin
    results = [parse_stream(each.stream(), request.new_tokens) for request, each in exchanges]
    return results, duration


async def _keep_in_flight(requests: Sequence[Request], concurrency: int, ask: Ask) -> None:
    """Ask for the next one whenever one of so many has ended."""
    waiting = iter(requests)

    async def work() -> None:
        for request in waiting:
            await ask(request)

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def _send_at(times: Sequence[float], requests: Sequence[Request], ask: Ask) -> None:
    """Ask for each at its time, in seconds from now, however many are in flight."""

    async def wait(seconds: float, request: Request) -> None:
        await asyncio.sleep(seconds)
        await ask(request)

    await asyncio.gather(*(wait(at, one) for at, one in zip(times, requests, strict=True)))


class Exchange(asyncio.Protocol):
    """One request, and the bytes of its response, each with the time at which it came.

    Args:
        url: of the server.
        request: what is asked.
    """

    def __init__(self, url: str, request: Request) -> None:
        self._address = urlsplit(url)
        self._request = request
        self._http = h11.Connection(h11.CLIENT)
        self._pieces: list[tuple[float, bytes]] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_bytes = b""
        self._sent_at = 0.0
        self._error: str | None = None

    async def run(self) -> None:
        """Send the request over a connection of its own, and record what comes."""
        self._sent_at = time.perf_counter()
        host, port = self._address.hostname or "localhost", self._address.port or 80
        try:
            async with asyncio.timeout(TIMEOUT_S):
                loop = asyncio.get_running_loop()
                transport, _ = await loop.create_connection(lambda: self, host, port)
                try:
                    transport.write(self._head_and_body())
                    await self._ended
                finally:
                    transport.abort()
        except OSError as error:
            self._error = f"{type(error).__name__}: {error}"

    def data_received(self, data: bytes) -> None:
        """Record it."""
        self._pieces.append((time.perf_counter(), data))
        self._last_bytes = (self._last_bytes + data)[-len(LAST_CHUNK) :]
        if self._last_bytes == LAST_CHUNK:  # not every server closes, as it is asked to
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """The response has ended, or the connection has broken."""
        if exc is not None:
            self._error = f"{type(exc).__name__}: {exc}"
        self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def stream(self) -> RawStream:
        """The lines of the response."""
        stream = RawStream(self._sent_at, error=self._error)
        status, rest = 0, b""
        try:
            for at, event in self._events():
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    *lines, rest = (rest + bytes(event.data)).split(b"\n")
                    stream.lines += [(at, line) for line in lines]
        except h11.RemoteProtocolError as error:
            stream.error = stream.error or f"{type(error).__name__}: {error}"
        if stream.error is None and status != HTTPStatus.OK:
            stream.error = f"HTTP {status}: {rest[:300]!r}"
        return stream

    def _events(self) -> Iterator[tuple[float, Any]]:
        """What h11 reads in the recorded bytes. Raises RemoteProtocolError."""
        for at, piece in (*self._pieces, (0.0, b"")):
            self._http.receive_data(piece)
            event = self._http.next_event()
            while event not in (h11.NEED_DATA, h11.PAUSED):
                yield at, event
                if isinstance(event, h11.ConnectionClosed | h11.EndOfMessage):
                    return
                event = self._http.next_event()

    def _head_and_body(self) -> bytes:
        body = {
            "model": self._request.model,
            "prompt": self._request.prompt,
            "max_tokens": self._request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text = json.dumps(body).encode()
        headers = [
            ("Host", self._address.netloc),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(text))),
            ("Connection", "close"),
        ]
        events = (
            h11.Request(method="POST", target="/v1/completions", headers=headers),
            h11.Data(data=text),
            h11.EndOfMessage(),
        )
        return b"".join(self._http.send(event) or b"" for event in events)


def parse_stream(stream: RawStream, new_tokens: int) -> RequestResult:
    """Read the events of a stream: one for each token, then the finish reason, then the usage.

    Args:
        stream: the recorded response. The number of tokens is the one that its usage states.
        new_tokens: the requested length. An answer of any other length is a failure.
    """
    token_times: list[float] = []
    num_tokens = 0
    error = stream.error
    for arrived_at, line in stream.lines:
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        event: dict[str, Any] = json.loads(line[5:])
        if error is None and event.get("error"):
            error = str(event["error"])
        usage = event.get("usage") or {}
        num_tokens = usage.get("completion_tokens", num_tokens)
        for choice in event.get("choices", ()):
            only_finishes = choice.get("finish_reason") and not choice["text"]
            if not only_finishes:
                token_times.append(arrived_at)
    if error is None and (num_tokens != new_tokens or not token_times):
        error = f"{num_tokens} tokens of {new_tokens}"
    return RequestResult(stream.sent_at, token_times, num_tokens, error)
