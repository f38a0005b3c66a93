"""The real app over ASGI, with the real store, tokenizer and pool; only the engine behind the seam is a scripted one.

For what a real engine does not do when it is told to: refuse, fail, be late. `test_real_engine.py` has the rest.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from crma.prompts import chat_format
from crma.pull import BaseModel
from crma.store import AdapterStore
from server.app import create_app
from server.engine.adapter_pool import AdapterPool
from server.engine.request import EngineStats, FinishReason, Request, RequestOutput, Timings, TokenLogprob
from server.frontend import Frontend
from server.metrics import Metrics
from server.registry import Registry
from server.schemas import ServedModel
from server.settings import Settings

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
                end: dict[str, Any] = {"completion_tokens": 2, "cached_tokens": 1, "timings": Timings(0.1, 0.2, 0.3)}
                end |= {"finish_reason": self.ending[0], "error": self.ending[1]}
                yield output((6,), answer[len(first) :], tokens(asked.logprobs, -0.25), **end)
        finally:
            self.running -= 1

    async def stop(self) -> None:
        assert self.running == 0

    def stats(self) -> EngineStats:
        tasks = tuple(r.selection.task_digest for r in self.requests if r.selection.task_digest)
        return EngineStats(num_steps=len(self.requests), resident=tasks[:1], running_adapters=tasks)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny.filled_store`; read only."""
    return tiny.filled_store(tmp_path_factory.mktemp("store"), BASE).root


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


Serve = Callable[..., Any]


@pytest.fixture
async def serve(root: Path) -> AsyncIterator[Serve]:
    """Starts an app with the settings given, and waits until it is ready unless told not to."""
    async with AsyncExitStack() as stack:

        async def start(*, wait: bool = True, **options: Any) -> Served:
            settings, engine = Settings(**{"store": root, **options}), FakeEngine()
            metrics = Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)
            store, tokenizer, pool = AdapterStore(settings.store), tiny.tokenizer(), AdapterPool(tiny.injection(), 4)
            registry = Registry(store, BASE, pool, chat_format(tokenizer), metrics, tiny.injection().shapes)
            model = ServedModel(name="tiny", digest=BASE.digest, dtype="float32", max_model_len=128)
            app = create_app(Frontend(settings, engine, registry, tokenizer, model, metrics), on_stop=engine.stop)
            await stack.enter_async_context(app.router.lifespan_context(app))
            if wait:
                await app.state.starting
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
            return Served(app, await stack.enter_async_context(client), engine)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """An app with the default settings, ready."""
    return await serve()
