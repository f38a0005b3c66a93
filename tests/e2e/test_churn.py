"""Requests, cancellations, publishing and administration at once, over real HTTP on a tiny model.

Every answer must be the oracle's, and nothing may be left in the engine afterwards.

python -m pytest -m e2e tests/e2e/test_churn.py --churn-seconds 1200
"""

import asyncio
import json
import random
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
import pytest
import tiny
import uvicorn
from fastapi import FastAPI
from schedules import Call, World

from crma.core.selection import AdapterSelection
from crma.models.base_model import BaseModel
from crma.models.prompts import BASE_TEMPLATE
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry
from server.engine.request import EngineStats, SamplingParams
from server.settings import Settings
from server.startup import build

pytestmark = pytest.mark.e2e

TASKS = [f"task{i}" for i in range(6)]
PROMPTS = [f"{'the other answers ' * (i % 4)}question {i}?" for i in range(12)]
ACTIONS = ["load", "unload", "unload?when_in_use=wait", "unload?when_in_use=cancel", "pin", "unpin"]
ADMIN = {"Authorization": "Bearer admin"}
# 404: the task is not published yet. 409: its adapter is in use, or was unloaded with `cancel`.
# 429: the queue is full. 504: the deadline has passed.
EXPECTED_STATUSES = {200, 404, 409, 429, 504}


@dataclass
class Churn:
    """Clients that ask, disconnect, publish and administrate, until a point in time.

    Args:
        client: of the server.
        store: the server's store.
        base: the model of the adapters that are published.
        until: when to end, by `time.monotonic`.
        answers: gets a line of JSON for every answer, to be compared with the oracle afterwards:
            request body, provenance and text.
    """

    client: httpx.AsyncClient
    store: AdapterStore
    base: BaseModel
    until: float
    answers: TextIO
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    counts: Counter[str] = field(default_factory=Counter)
    rss_mib: list[float] = field(default_factory=list)  # of this process, one value a second

    async def run(self) -> None:
        workers: list[Callable[[], Awaitable[None]]] = [self.ask] * 12 + [self.disconnect] * 3
        workers += [self.publish, self.administrate, self.administrate, self.measure_memory]
        async with asyncio.TaskGroup() as group:
            for work in workers:
                group.create_task(self.repeat(work))

    async def repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self.until:
            await work()

    def random_body(self) -> dict[str, Any]:
        task = self.rng.choice([None, *TASKS, *TASKS])
        greedy: dict[str, Any] = {}
        sampled = {"temperature": 1.0, "seed": self.rng.randrange(3), "top_k": 9}
        sampling = self.rng.choice([greedy, greedy, sampled])
        crma = self.rng.choice([None, True, False]) if task else self.rng.choice([True, False])
        return {
            "prompt": self.rng.choice(PROMPTS),
            "task": task,
            "crma": crma,
            "max_tokens": self.rng.choice([1, 7, 30]),
            **sampling,
        }

    async def ask(self) -> None:
        """Send a request, sometimes with a deadline that it cannot meet."""
        body = self.random_body() | {"timeout_s": self.rng.choice([0.05, 30.0, 30.0, 30.0])}
        response = await self.client.post("/generate", json=body)
        self.counts[f"answered {response.status_code}"] += 1
        assert response.status_code in EXPECTED_STATUSES, response.text
        if response.status_code == 200:
            answer = response.json()
            self.counts["cached tokens"] += answer["usage"]["cached_tokens"]
            self.answers.write(json.dumps([body, answer["provenance"], answer["text"]]) + "\n")

    async def disconnect(self) -> None:
        """Read a little of a stream, or nothing, and close the connection."""
        body = self.random_body() | {"stream": True, "max_tokens": 150}
        num_lines_left = self.rng.choice([0, 1, 9, 200])
        async with self.client.stream("POST", "/generate", json=body) as response:
            async for _ in response.aiter_lines():
                num_lines_left -= 1
                if num_lines_left < 0:
                    break
        self.counts["disconnected"] += 1

    async def publish(self) -> None:
        """Publish a version of a task, or make one of its versions serve again."""
        number = self.rng.randrange(len(TASKS))
        task = TASKS[number]
        seed = 10 * number + self.rng.randrange(4)
        if self.rng.random() < 0.8 and task in self.store.task_names():
            version = self.rng.choice(self.store.task_versions(task))
            await asyncio.to_thread(self.store.set_serving, {f"tasks/{task}": version})
        else:
            backbone = self.store.backbone()
            digest = backbone.digest if backbone else None
            await asyncio.to_thread(
                tiny.publish, self.store, self.base, task, seed, backbone=digest
            )
        self.counts["published"] += 1
        await asyncio.sleep(1.0)

    async def measure_memory(self) -> None:
        self.rss_mib.append(resident_mib())
        await asyncio.sleep(1.0)

    async def administrate(self) -> None:
        task = self.rng.choice(TASKS)
        action = self.rng.choice(ACTIONS)
        response = await self.client.post(f"/adapters/{task}/{action}", headers=ADMIN)
        self.counts[f"{action} {response.status_code}"] += 1
        assert response.status_code in EXPECTED_STATUSES | {503}, response.text
        if action == "pin":
            await self.client.post(f"/adapters/{task}/unpin", headers=ADMIN)
        await asyncio.sleep(0.05)

    def mib_per_minute(self) -> float:
        """The growth of the memory in the second half of the churn."""
        half = self.rss_mib[len(self.rss_mib) // 2 :]
        return 60 * statistics.linear_regression(range(len(half)), half).slope


def resident_mib() -> float:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS in /proc/self/status")


def fill_store(store: AdapterStore, base: BaseModel) -> BackboneEntry:
    """Publish half of the tasks, and the backbone of all."""
    backbone = tiny.publish_backbone(store, base)
    for i, task in enumerate(TASKS[:3]):
        tiny.publish(store, base, task, i, backbone=backbone.digest)
    return backbone


def build_app(store: AdapterStore, base: BaseModel) -> FastAPI:
    """The real app, with limits that are tight enough for preemption, eviction and a full queue."""
    settings = Settings(
        home=base.path.parents[1],
        model=base.name,
        store=store.root,
        admin_key="admin",
        dtype="float32",
        max_loaded_adapters=6,
        kv_cache_tokens=320,
        max_model_len=300,
        max_queue=10,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        drain_timeout_s=5,
        num_threads=1,
    )
    return build(settings)


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app over real HTTP, once the app is ready; the server stops afterwards."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    listener = socket.create_server(("127.0.0.1", 0))
    running = asyncio.create_task(server.serve([listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.1)
            yield client
    finally:
        server.should_exit = True
        await running


async def wait_until_idle(engine: Any) -> EngineStats:
    """The engine's stats once it has no request."""
    stats: EngineStats = engine.stats()
    while stats.num_requests_running + stats.num_requests_waiting > 0:
        await asyncio.sleep(0.1)
        stats = engine.stats()
    return stats


def leftovers(engine: Any) -> dict[str, int]:
    """Blocks and adapters that an idle engine still holds; it must pass its integrity check."""
    engine.engine.check_integrity()
    blocks = engine.engine.scheduler.blocks
    return {"blocks": blocks.capacity - blocks.num_free, "pins": engine.pool.num_users()}


def oracle_text(world: World, body: dict[str, Any], provenance: dict[str, Any]) -> str:
    """The text that the model gives alone with the adapters in the answer's provenance."""
    names = ("temperature", "seed", "top_k", "max_tokens")
    sampling = SamplingParams(**{name: body[name] for name in names if name in body})
    tokenizer = tiny.tokenizer()
    prompt_format = tiny.FORMAT if provenance["task"] else BASE_TEMPLATE
    prompt = tuple(prompt_format.encode(tokenizer, body["prompt"]))
    selection = AdapterSelection(provenance["task"], provenance["crma"])
    alone = world.alone(Call(selection, prompt, sampling), 0, (1,))
    return tokenizer.decode(alone.token_ids, skip_special_tokens=True)


def verdict(world: World, body: dict[str, Any], provenance: dict[str, Any], text: str) -> str:
    """Whether an answer is the oracle's: "right", "at a border" or "wrong".

    In about 10^6 draws, a few fall on the border between two tokens, within the rounding of fp32.
    The oracle then gives the answer at a minimally higher or lower temperature.
    """
    if text == oracle_text(world, body, provenance):
        return "right"
    for factor in (0.9999, 1.0001):
        temperature = body.get("temperature", 0.0) * factor
        if text == oracle_text(world, body | {"temperature": temperature}, provenance):
            return "at a border"
    return "wrong"


def judge(store: AdapterStore, backbone: BackboneEntry, answers: list[str]) -> dict[str, list[str]]:
    """Sort the written answers by verdict, with every adapter that was ever published."""
    adapters: dict[str, Any] = {backbone.digest: backbone.load()}
    for name in store.task_names():
        for version in store.task_versions(name):
            entry = store.task(name, version)
            adapters[entry.digest] = entry.load()
    world = World(tiny.injection(), adapters)
    judged: dict[str, list[str]] = {"right": [], "at a border": [], "wrong": []}
    for line in answers:
        judged[verdict(world, *json.loads(line))].append(line)
    return judged


async def test_churn_gives_no_wrong_answer_and_leaves_nothing_behind(
    base: BaseModel,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds = request.config.getoption("--churn-seconds")
    store = AdapterStore(tmp_path / "store")
    backbone = fill_store(store, base)
    app = build_app(store, base)
    written = tmp_path / "answers.jsonl"
    async with serving(app) as client:
        with written.open("w") as answers:
            churn = Churn(client, store, base, time.monotonic() + seconds, answers)
            await asyncio.wait_for(churn.run(), seconds + 60)
        engine = app.state.frontend.engine
        stats = await wait_until_idle(engine)
        left = leftovers(engine)
    judged = judge(store, backbone, written.read_text().splitlines())
    shown = {
        **dict(sorted(churn.counts.items())),
        **{name: len(lines) for name, lines in judged.items()},
        "left": left,
        "steps": stats.num_steps,
        "preempted": stats.num_preemptions,
        "loads": stats.adapter_loads,
        "evictions": stats.adapter_evictions,
        "RSS MiB": round(churn.rss_mib[-1]),
        "MiB a minute": round(churn.mib_per_minute(), 2),
    }
    with capsys.disabled():
        sys.stderr.write(json.dumps(shown) + "\n")
    assert not judged["wrong"], judged["wrong"][:3]
    assert left == {"blocks": 0, "pins": 0}
    assert not stats.has_failed
    assert churn.counts["answered 200"] > 0
    assert stats.num_preemptions > 0
    assert stats.adapter_evictions > 0
