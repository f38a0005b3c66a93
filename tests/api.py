"""The real app over ASGI on a scripted engine: what the tests of the routes share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from crma.models.base_model import BaseModel
from server.engine.request import (
    EngineStats,
    FinishReason,
    Request,
    RequestOutput,
    Timings,
    TokenLogprob,
)

JSON = {"content-type": "application/json"}
SCOPE = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": []}
BASE = BaseModel("tiny", "sha256:" + "b" * 64, Path("nowhere"), {})


def tokens(asked: int | None, *logprobs: float) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of tokens, where they were asked for; token k of the most probable ones has -k."""
    top = tuple((token, -float(token)) for token in range(asked or 0))
    return tuple(TokenLogprob(each, top) for each in logprobs if asked is not None)


@dataclass
class FakeEngine:
    """The seam with a script: two tokens and an end, or a refusal, or a failure."""

    answer: Callable[[Request], str] = lambda _: "one two"
    refusal: Exception | None = None
    ending: tuple[FinishReason, str | None] = (FinishReason.STOP, None)
    fail_at_once: bool = False
    on_failure: Callable[[], None] = lambda: None
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        return self._outputs(request)

    async def _outputs(self, request: Request) -> AsyncIterator[RequestOutput]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            answer, asked = self.answer(request), request.sampling
            first = answer.split(" ")[0]
            for index in range(asked.n):
                output = partial(RequestOutput, request.id, index)
                prompt = tokens(asked.prompt_logprobs, *[-1.0] * (len(request.prompt_ids) - 1))
                if not self.fail_at_once:
                    yield output((5,), first, tokens(asked.logprobs, -0.5), () if index else prompt)
                await asyncio.sleep(0)
                end: dict[str, Any] = {
                    "completion_tokens": 2,
                    "cached_tokens": 1,
                    "timings": Timings(0.1, 0.2, 0.3),
                }
                end |= {"finish_reason": self.ending[0], "error": self.ending[1]}
                yield output((6,), answer[len(first) :], tokens(asked.logprobs, -0.25), **end)
        finally:
            self.running -= 1

    async def stop(self) -> None:
        assert self.running == 0

    def stats(self) -> EngineStats:
        tasks = tuple(r.selection.task_digest for r in self.requests if r.selection.task_digest)
        return EngineStats(num_steps=len(self.requests), resident=tasks[:1], running_adapters=tasks)


@dataclass
class Served:
    """One running app and what stands around it."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: FakeEngine

    async def generate(self, **body: Any) -> httpx.Response:
        return await self.client.post("/generate", json={"prompt": "Hi", **body})

    async def error(self, **body: Any) -> tuple[int, str]:
        response = await self.generate(**body)
        return response.status_code, response.json()["error"]["code"]

    async def metrics(self) -> str:
        return (await self.client.get("/metrics")).text


async def refused(served: Served, status: int, code: str, **request: Any) -> dict[str, Any]:
    """The error of a request that must be refused, in the shape of its path; after it a good one must work."""
    path = request.pop("path", "/generate")
    response = await served.client.post(path, **{"headers": JSON, **request})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    openai, ours = (
        ["message", "type", "param", "code"],
        ["code", "message", "field", "value", "allowed"],
    )
    assert (list(error), error["code"]) == (openai if path.startswith("/v1/") else ours, code)
    served.engine.refusal = None
    if status != 401:
        assert (await served.generate()).status_code == 200
    return error


Serve = Callable[..., Any]
