"""The real app over ASGI, with the real store and tokenizer; only the engine behind the seam is a scripted one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crma.adapter import Backbone, CrmaConfig
from crma.lora import Lora, LoraConfig, LoraPair
from crma.prompts import PromptFormat, chat_format
from crma.pull import BaseModel
from crma.selection import AdapterSelection
from crma.store import AdapterStore
from server.app import create_app
from server.engine.request import EngineStats, FinishReason, Request, RequestOutput, Timings
from server.metrics import Metrics
from server.registry import Registry
from server.schemas import ServedModel
from server.settings import Settings

BASE = BaseModel("tiny", "sha256:" + "b" * 64, Path("nowhere"), {})
MODULES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
SHAPES = dict.fromkeys(MODULES, (8, 8))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class FakeEngine:
    """The seam with a script: two tokens and an end, or a refusal, a failure, or a wait for `gate`."""

    answer: Callable[[Request], str] = lambda _: "one two"
    refusal: Exception | None = None
    ending: tuple[FinishReason, str | None] = (FinishReason.STOP, None)
    fail_at_once: bool = False
    gate: asyncio.Event | None = None
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
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
            first, _, rest = self.answer(request).partition(" ")
            for index in range(request.sampling.n):
                if not self.fail_at_once:
                    yield RequestOutput(request.id, index, (5,), first, logprobs=(-0.5,))
                await (self.gate.wait() if self.gate else asyncio.sleep(0))
                reason, error = self.ending
                text = f" {rest}" if rest else ""
                times = Timings(0.1, 0.2, 0.3)
                yield RequestOutput(request.id, index, (6,), text, (-0.25,), reason, error, 2, 1, times)
        finally:
            self.running -= 1

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        tasks = tuple(r.selection.task_digest for r in self.requests if r.selection.task_digest)
        return EngineStats(num_steps=len(self.requests), resident=tasks[:1], running_adapters=tasks)


class FakePool:
    """Loads for real, keeps digests only."""

    def __init__(self) -> None:
        self.loaders: dict[str, Callable[[], Any]] = {}
        self.loaded: set[str] = set()
        self.pins: list[str] = []

    def register(self, digest: str, loader: Callable[[], Any]) -> None:
        self.loaders.setdefault(digest, loader)

    def load(self, digest: str) -> None:
        self.loaders[digest]()
        self.loaded.add(digest)

    def unload(self, digest: str) -> None:
        from server.engine.adapter_pool import AdapterInUse

        if digest in self.pins:
            raise AdapterInUse("in use")
        self.loaded.discard(digest)

    def pin(self, digest: str) -> None:
        self.load(digest)
        self.pins.append(digest)

    def unpin(self, digest: str) -> None:
        self.pins.remove(digest)

    def resident(self) -> tuple[str, ...]:
        return tuple(self.loaded)


def random_lora(seed: int) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    pairs = {m: LoraPair(*(torch.randn(s, generator=generator) for s in ((2, 8), (8, 2))), 2.0) for m in MODULES}
    return Lora(LoraConfig(2, 4.0, ("q_proj",)), pairs)


def publish(
    store: AdapterStore, name: str, *, backbone: str | None, seed: int, base: BaseModel = BASE, **options: Any
) -> str:
    prompt_format = PromptFormat("<|im_start|>", f"[{name}]", "<|im_end|>")
    entry = store.publish_task(
        name,
        random_lora(seed),
        base=base,
        backbone=backbone,
        prompt_format=prompt_format,
        trained_on=None,
        measured={"accuracy": 0.5},
        licence="Apache-2.0",
        **options,
    )
    return entry.digest


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """medical@v1 (serving) and @v2, trained with CRMA; legal, an import without; a question set."""
    root = tmp_path_factory.mktemp("store") / "store"
    store = AdapterStore(root)
    backbone = store.publish_backbone(
        Backbone(CrmaConfig(num_layers=2, hidden_size=8, num_streams=2, stream_rank=2)),
        base=BASE,
        lineage=(),
        trained_on=None,
        measured={},
        licence="x",
    )
    publish(store, "medical", backbone=backbone.digest, seed=0)
    publish(store, "medical", backbone=backbone.digest, seed=1, serve=False)
    publish(store, "legal", backbone=None, seed=2)
    (root / "question_sets").mkdir()
    lines = [
        f'{{"id": "{task}{i}", "task": "{task}", "question": "Question {i}?", "answers": ["one two"]}}'
        for task in ("medical", "legal")
        for i in range(3)
    ]
    (root / "question_sets" / "public.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def root(whole_store: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may change."""
    return Path(shutil.copytree(whole_store, tmp_path / "store"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, two special ones, a chat template."""
    letters = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)


@dataclass
class Served:
    """One running app and what stands around it."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: FakeEngine
    pool: FakePool

    async def generate(self, **body: Any) -> httpx.Response:
        return await self.client.post("/generate", json={"prompt": "Hi", **body})

    def last(self) -> AdapterSelection:
        return self.engine.requests[-1].selection


Serve = Callable[..., Any]


@pytest.fixture
async def serve(root: Path, tokenizer: PreTrainedTokenizerFast) -> AsyncIterator[Serve]:
    """Starts an app with the settings given, and waits until it is ready unless told not to."""
    async with AsyncExitStack() as stack:

        async def start(*, wait: bool = True, **options: Any) -> Served:
            settings = Settings(**{"store": root, **options})
            engine, pool = FakeEngine(), FakePool()
            metrics = Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)
            registry = Registry(
                AdapterStore(settings.store),
                BASE,
                pool=pool,
                base_format=chat_format(tokenizer),
                metrics=metrics,
                shapes=SHAPES,
                load_backbone=settings.load_backbone,
            )
            model = ServedModel(name="tiny", digest=BASE.digest, dtype="float32", max_model_len=128)
            app = create_app(
                settings, engine=engine, registry=registry, tokenizer=tokenizer, model=model, metrics=metrics
            )
            await stack.enter_async_context(app.router.lifespan_context(app))
            if wait:
                await app.state.starting
            transport = httpx.ASGITransport(app)
            client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))
            return Served(app, client, engine, pool)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """An app with the default settings, ready."""
    return await serve()
