"""server.engine.adapter_pool: what is pinned stays, what is not may go, and nothing is half there."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from crma.adapter import Backbone
from crma.errors import DigestMismatch, InvalidAdapter, NotFound
from crma.lora import Lora, LoraConfig, LoraPair
from crma.selection import AdapterSelection
from server.engine.adapter_pool import AdapterInUse, AdapterPool

ADAPTERS = tiny.adapters(tiny.injection())
PATH = next(iter(tiny.injection().shapes))


def broken() -> Lora:
    raise DigestMismatch("not what its manifest says", field="adapter_model.safetensors")


def misfit() -> Lora:
    return Lora(LoraConfig(1, 1.0, ("q_proj",)), {PATH: LoraPair(torch.zeros(1, 7), torch.zeros(7, 1), 1.0)})


FAILING = {"broken": (broken, DigestMismatch), "misfit": (misfit, InvalidAdapter), "unknown": (None, NotFound)}
known = st.sampled_from(sorted(ADAPTERS))


def make_pool(max_resident: int) -> AdapterPool:
    pool = AdapterPool(tiny.injection(), max_resident)
    for digest, adapter in ADAPTERS.items():
        pool.register(digest, lambda adapter=adapter: adapter)
    for digest, (loader, _) in FAILING.items():
        if loader is not None:
            pool.register(digest, loader)
    return pool


class PoolMachine(RuleBasedStateMachine):
    """Pins and the order of last use, in plain Python, beside the pool."""

    @initialize(max_resident=st.integers(1, 3))
    def start(self, max_resident: int) -> None:
        self.pool = make_pool(max_resident)
        self.pins: Counter[str] = Counter()
        self.used: list[str] = []

    def use(self, digest: str, pins: int = 0) -> None:
        """Used last, and so the last to be evicted."""
        self.used = [d for d in self.used if d != digest] + [digest]
        self.pins[digest] += pins
        self.evict()

    def evict(self) -> None:
        surplus = max(0, len(self.used) - self.pool.max_resident)
        gone = [d for d in self.used if not self.pins[d]][:surplus]
        self.used = [d for d in self.used if d not in gone]

    @rule(digest=known)
    def load(self, digest: str) -> None:
        self.pool.load(digest)
        self.use(digest)

    @rule(task=st.sampled_from([None, "task-0", "task-1"]), crma=st.sampled_from([None, "crma-0", "crma-1"]))
    def pin(self, task: str | None, crma: str | None) -> None:
        self.pool.pin_selection(AdapterSelection(task, crma))
        for digest in (task, crma):
            if digest is not None:
                self.use(digest, pins=1)

    @rule(digest=known, bad=st.sampled_from(sorted(FAILING)))
    def pin_one_that_fails(self, digest: str, bad: str) -> None:
        """The other one is not left pinned; and so it is each time."""
        with pytest.raises(FAILING[bad][1]):
            self.pool.pin_selection(AdapterSelection(digest, bad))
        self.use(digest)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = sorted(self.pins.elements())
        if pinned:
            digest = data.draw(st.sampled_from(pinned))
            self.pool.unpin(digest)
            self.pins[digest] -= 1
            self.evict()

    @rule(digest=st.sampled_from([*sorted(ADAPTERS), "unknown"]))
    def unload(self, digest: str) -> None:
        if self.pins[digest]:
            with pytest.raises(AdapterInUse):
                self.pool.unload(digest)
        else:
            self.pool.unload(digest)
            self.used = [d for d in self.used if d != digest]

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_pins() == self.pins.total()
        assert list(self.pool.resident()) == self.used
        assert set(self.used) >= set(self.pins.elements()), "a pinned adapter is gone"
        assert all(torch.equal(lora.pairs[PATH].B, ADAPTERS[d].pairs[PATH].B) for d, lora in self.pool.loras.items())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(derandomize=True, max_examples=40, stateful_step_count=25, deadline=None)


def test_many_who_want_one_adapter_wait_for_one_load() -> None:
    """Eight threads; the load ends only once all of them are on their way."""
    pool, loads, on_their_way, go = make_pool(2), [], threading.Semaphore(0), threading.Event()

    def slow() -> Lora | Backbone:
        loads.append(1)
        assert go.wait(10)
        return ADAPTERS["task-0"]

    def want() -> None:
        on_their_way.release()
        pool.pin("slow")

    pool.register("slow", slow)
    with ThreadPoolExecutor(8) as threads:
        wanted = [threads.submit(want) for _ in range(8)]
        assert all(on_their_way.acquire(timeout=10) for _ in wanted)
        go.set()
        for each in wanted:
            each.result(10)
    assert (len(loads), pool.num_pins(), pool.stats().loads) == (1, 8, 1)
    pool.check_integrity()
