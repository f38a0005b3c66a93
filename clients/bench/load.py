"""Load on an OpenAI-compatible server: streamed completions of token ids.

So many requests are in flight, or they arrive at random.

The generator shares the cores with the server it measures. While the load runs, it only records
when bytes arrived; it parses them afterwards.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.metrics import RequestResult
from bench.workloads import Request, Workload

Ask = Callable[[Request], Awaitable[None]]


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
    streams: list[tuple[Request, RawStream]] = []

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def ask(request: Request) -> None:
            streams.append((request, await _stream(client, request)))

        begin = time.perf_counter()
        if workload.arrival_share is None:
            await _keep_in_flight(requests, workload.concurrency, ask)
        else:
            await _send_at(workload.arrival_times(seed), requests, ask)
        duration = time.perf_counter() - begin
    results = [parse_stream(stream, request.new_tokens) for request, stream in streams]
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


async def _stream(client: httpx.AsyncClient, request: Request) -> RawStream:
    """Send one request and record its response."""
    body = {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": request.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    unfinished_line = b""
    stream = RawStream(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for chunk in response.aiter_bytes():
                *lines, unfinished_line = (unfinished_line + chunk).split(b"\n")
                now = time.perf_counter()
                stream.lines += [(now, line) for line in lines]
    except httpx.HTTPError as error:
        stream.error = f"{type(error).__name__}: {error}"
        return stream
    if not response.is_success:
        stream.error = f"HTTP {response.status_code}: {unfinished_line[:300]!r}"
    return stream


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
