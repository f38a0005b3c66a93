"""Load on an OpenAI-compatible server: streamed completions of token ids, a fixed number of them at once.

It shares the cores with what it measures, so it only notes when bytes came, and reads them when the load is over.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, replace
from typing import Any, Self

import httpx

from bench.latency import Answer

Lines = list[tuple[float, bytes]]


@dataclass(frozen=True)
class Workload:
    """Requests that name `models` in turn; `measure` is the figure that the row is about."""

    measure: str = "output_tok_s"
    models: tuple[str, ...] = ("base",)
    num_requests: int = 32
    concurrency: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 128

    def requests(self, seed: str) -> list[tuple[str, list[int]]]:
        """Model and prompt of each. No two prompts begin alike, so a prefix cache has nothing to give."""
        ids, models = random.Random(seed), self.models
        prompts = [
            [ids.randrange(300, 40000) for _ in range(self.prompt_tokens)]
            for _ in range(self.num_requests)
        ]
        return [(models[i % len(models)], prompt) for i, prompt in enumerate(prompts)]

    def short(self) -> Self:
        """To warm up, and to try."""
        few, new = min(self.num_requests, self.concurrency), min(self.new_tokens, 8)
        return replace(self, num_requests=few, new_tokens=new)


def run(url: str, workload: Workload, seed: str) -> tuple[list[Answer], float]:
    """The answers and the seconds it took from first to last; a request that fails is an answer with an error."""
    return asyncio.run(_run(url, workload, seed))


async def _run(url: str, workload: Workload, seed: str) -> tuple[list[Answer], float]:
    waiting = iter(workload.requests(seed))
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def worker() -> list[tuple[float, Lines, str | None]]:
            return [
                await _ask(client, model, prompt, workload.new_tokens) for model, prompt in waiting
            ]

        begin = time.perf_counter()
        heard = await asyncio.gather(*(worker() for _ in range(workload.concurrency)))
        wall = time.perf_counter() - begin
    return [read(*each, workload.new_tokens) for some in heard for each in some], wall


async def _ask(
    client: httpx.AsyncClient, model: str, prompt: list[int], new: int
) -> tuple[float, Lines, str | None]:
    """When it was sent, the lines that came and when, and what went wrong."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
    }
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    lines, rest, start = Lines(), b"", time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for chunk in response.aiter_bytes():
                *whole, rest = (rest + chunk).split(b"\n")
                lines += [(time.perf_counter(), line) for line in whole]
    except httpx.HTTPError as error:
        return start, lines, f"{type(error).__name__}: {error}"
    return (
        start,
        lines,
        None if response.is_success else f"HTTP {response.status_code}: {rest[:300]!r}",
    )


def read(start: float, lines: Lines, error: str | None, new_tokens: int) -> Answer:
    """The answer in the lines of a stream: an event a token, then one of a finish_reason without text, then the usage.

    The usage says how many tokens there were. An answer of another length than was asked for is a failure.
    """
    times, num_tokens = [], 0
    for when, line in lines:
        if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
            event: dict[str, Any] = json.loads(line[5:])
            error = error or (str(event["error"]) if event.get("error") else None)
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
            times += [
                when
                for each in event.get("choices", ())
                if each["text"] or not each.get("finish_reason")
            ]
    if not error and (num_tokens != new_tokens or not times):
        error = f"{num_tokens} tokens of {new_tokens}"
    return Answer(start, times, num_tokens, error)
