"""Everything at once for as long as it is asked: no wrong answer, nothing left behind. Real HTTP on a tiny model.

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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
import pytest
import tiny
import uvicorn
from schedules import Call, World

from crma.core.selection import AdapterSelection
from crma.models.base_model import BaseModel
from crma.models.prompts import chat_format
from crma.store.adapter_store import AdapterStore
from server.__main__ import build
from server.engine.request import SamplingParams
from server.settings import Settings

pytestmark = pytest.mark.e2e

TASKS = [f"task{i}" for i in range(6)]
PROMPTS = [f"{'the other answers ' * (i % 4)}question {i}?" for i in range(12)]
ACTIONS = ["load", "unload", "unload?when_in_use=wait", "unload?when_in_use=cancel", "pin", "unpin"]
ADMIN = {"Authorization": "Bearer admin"}
EXPECTED = {
    200,
    404,
    409,
    429,
    504,
}  # a task that is not there yet, an adapter in use or cancelled, a full queue, late


@dataclass
class Churn:
    """Clients that ask, leave and administrate. Answers are written down, to be compared when all is over."""

    client: httpx.AsyncClient
    store: AdapterStore
    base: BaseModel
    until: float
    answers: TextIO
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    counts: Counter[str] = field(default_factory=Counter)
    rss: list[float] = field(default_factory=list)  # one a second

    async def run(self) -> None:
        workers: list[Callable[[], Awaitable[None]]] = [self.ask] * 12 + [self.leave] * 3
        workers += [self.publish, self.administrate, self.administrate, self.measure]
        async with asyncio.TaskGroup() as group:
            for work in workers:
                group.create_task(self.repeat(work))

    async def repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self.until:
            await work()

    def body(self) -> dict[str, Any]:
        task = self.rng.choice([None, *TASKS, *TASKS])
        sampling = self.rng.choice(
            [{}, {}, {"temperature": 1.0, "seed": self.rng.randrange(3), "top_k": 9}]
        )
        crma = self.rng.choice([None, True, False]) if task else self.rng.choice([True, False])
        prompt, max_tokens = self.rng.choice(PROMPTS), self.rng.choice([1, 7, 30])
        return {"prompt": prompt, "task": task, "crma": crma, "max_tokens": max_tokens} | sampling

    async def ask(self) -> None:
        body = self.body() | {"timeout_s": self.rng.choice([0.05, 30.0, 30.0, 30.0])}
        response = await self.client.post("/generate", json=body)
        self.counts[f"answered {response.status_code}"] += 1
        assert response.status_code in EXPECTED, response.text
        if response.status_code == 200:
            answer = response.json()
            self.counts["cached tokens"] += answer["usage"]["cached_tokens"]
            self.answers.write(json.dumps([body, answer["provenance"], answer["text"]]) + "\n")

    async def leave(self) -> None:
        """Reads a little of a stream, or nothing, and goes."""
        body = self.body() | {"stream": True, "max_tokens": 150}
        async with self.client.stream("POST", "/generate", json=body) as response:
            lines = self.rng.choice([0, 1, 9, 200])
            async for _ in response.aiter_lines():
                lines -= 1
                if lines < 0:
                    break
        self.counts["left"] += 1

    async def publish(self) -> None:
        """A new version of a task, or of the backbone with the tasks that were trained on it, or an old one again."""
        kind = self.rng.random()
        number = self.rng.randrange(len(TASKS))
        task, seed = TASKS[number], 10 * number + self.rng.randrange(4)
        if kind < 0.8 and task in self.store.task_names():
            version = self.rng.choice(self.store.task_versions(task))
            await asyncio.to_thread(self.store.set_serving, {f"tasks/{task}": version})
        else:
            under = self.store.backbone()
            await asyncio.to_thread(
                tiny.publish, self.store, self.base, task, seed, backbone=under and under.digest
            )
        self.counts["published"] += 1
        await asyncio.sleep(1.0)

    async def measure(self) -> None:
        fields = dict(
            line.split()[:2]
            for line in Path("/proc/self/status").read_text().splitlines()
            if "kB" in line
        )
        self.rss.append(int(fields["VmRSS:"]) / 1024)
        await asyncio.sleep(1.0)

    async def administrate(self) -> None:
        task = self.rng.choice(TASKS)
        action = self.rng.choice(ACTIONS)
        response = await self.client.post(f"/adapters/{task}/{action}", headers=ADMIN)
        self.counts[f"{action} {response.status_code}"] += 1
        assert response.status_code in EXPECTED | {503}, response.text
        if action == "pin":
            await self.client.post(f"/adapters/{task}/unpin", headers=ADMIN)
        await asyncio.sleep(0.05)


def alone(world: World, body: dict[str, Any], used: dict[str, Any]) -> str:
    """What the model gives alone with the adapters that answered, found by their digests."""
    options = {
        name: body[name] for name in ("temperature", "seed", "top_k", "max_tokens") if name in body
    }
    prompt_format = tiny.FORMAT if used["task"] else chat_format(tiny.tokenizer())
    ids = tuple(prompt_format.encode(tiny.tokenizer(), body["prompt"]))
    call = Call(AdapterSelection(used["task"], used["crma"]), ids, SamplingParams(**options))
    return tiny.tokenizer().decode(world.alone(call, 0, (1,)).token_ids, skip_special_tokens=True)


async def test_churn(
    base: BaseModel, tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    store = AdapterStore(tmp_path / "store")
    backbone = tiny.publish_backbone(store, base)
    for i, task in enumerate(TASKS[:3]):
        tiny.publish(store, base, task, i, backbone=backbone.digest)
    where = {
        "home": base.path.parents[1],
        "model": base.name,
        "store": store.root,
        "admin_key": "admin",
    }
    limits = {
        "max_loaded_adapters": 6,
        "kv_cache_tokens": 320,
        "max_model_len": 300,
        "max_queue": 10,
    }
    limits |= {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
        "drain_timeout_s": 5,
        "num_threads": 1,
    }
    app = build(Settings(**where, **limits, dtype="float32"))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve([listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    seconds = request.config.getoption("--churn-seconds")
    written = tmp_path / "answers.jsonl"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.1)
        with written.open("w") as answers:
            churn = Churn(client, store, base, time.monotonic() + seconds, answers)
            await asyncio.wait_for(churn.run(), seconds + 60)
        engine = app.state.frontend.engine
        while (stats := engine.stats()).num_requests_running + stats.num_requests_waiting:
            await asyncio.sleep(0.1)
    core, pool = engine.engine, engine.pool
    core.check_integrity()
    left = {
        "blocks": core.scheduler.blocks.capacity - core.scheduler.blocks.num_free,
        "pins": pool.num_users(),
    }
    server.should_exit = True
    await serving
    entries = [
        store.task(name, version)
        for name in store.task_names()
        for version in store.task_versions(name)
    ]
    world = World(tiny.injection(), {entry.digest: entry.load() for entry in (*entries, backbone)})
    verdicts = [
        (verdict(world, *json.loads(line)), line) for line in written.read_text().splitlines()
    ]
    wrong = [line for said, line in verdicts if said == "wrong"]
    half = churn.rss[len(churn.rss) // 2 :]
    slope = 60 * statistics.linear_regression(range(len(half)), half).slope
    shown = (
        dict(sorted(churn.counts.items()))
        | dict(Counter(said for said, _ in verdicts))
        | {"left": left}
    )
    shown |= {
        "steps": stats.num_steps,
        "preempted": stats.num_preemptions,
        "loads": stats.adapter_loads,
    }
    shown |= {
        "evictions": stats.adapter_evictions,
        "RSS MiB": round(half[-1]),
        "MiB a minute": round(slope, 2),
    }
    with capsys.disabled():
        sys.stderr.write(json.dumps(shown) + "\n")
    assert not wrong, wrong[:3]
    assert left == {"blocks": 0, "pins": 0}
    assert not stats.has_failed
    assert min(churn.counts["answered 200"], stats.num_preemptions, stats.adapter_evictions) > 0


def verdict(world: World, body: dict[str, Any], used: dict[str, Any], text: str) -> str:
    """Whether an answer is the oracle's. In some 10^6 draws a few fall on the border between two tokens, within the
    rounding of fp32: then the oracle at a temperature of a hair more or less gives the answer."""
    near = [
        body | {"temperature": body.get("temperature", 0.0) * factor} for factor in (0.9999, 1.0001)
    ]
    if text == alone(world, body, used):
        return "right"
    return "at a border" if text in [alone(world, each, used) for each in near] else "wrong"
