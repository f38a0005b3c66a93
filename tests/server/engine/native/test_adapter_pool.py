"""server.engine.native.adapter_pool: used and pinned adapters stay, others may go, limits hold."""

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import pytest
import tiny
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from schedules import Loads

from crma.core.errors import DigestMismatch, InvalidAdapter, NotFound
from crma.core.selection import AdapterSelection
from crma.method.backbone import Backbone
from crma.method.lora import Lora, LoraConfig, LoraPair
from server.engine.errors import AdapterInUse, AdapterPoolFull
from server.engine.native.adapter_pool import AdapterPool

ADAPTERS = tiny.adapters(tiny.injection())
PATH = next(iter(tiny.injection().shapes))
TASKS = [AdapterSelection(f"task-{i}") for i in range(3)]
SELECTIONS = [*TASKS, AdapterSelection(), AdapterSelection(None, "crma-0")]
SELECTIONS += [AdapterSelection(f"task-{i}", "crma-0") for i in range(3)]
UNKNOWN = [AdapterSelection("unknown"), AdapterSelection("task-0", "unknown")]
registered = st.sampled_from(sorted(ADAPTERS))


def broken() -> Lora:
    raise DigestMismatch("not what its manifest says", field="adapter_model.safetensors")


class ManualLoads(Loads):
    """Loads that end when the test says so, or when a caller blocks on one."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future = super().submit(function, *args, **kwargs)

        def result() -> Any:
            self.end_all()
            return Future.result(future)

        future.result = result
        return future

    def end_all(self) -> None:
        while self.waiting:
            self.end_one()


def served(adapter: Lora) -> Lora:
    return tiny.injection().bind(adapter)


def size(adapter: Lora | Backbone) -> int:
    if isinstance(adapter, Lora):
        return sum(tensor.nbytes for tensor in served(adapter).parameters())
    return sum(pair.A.nbytes + pair.B.nbytes for pair in adapter.folded("cpu", torch.float32))


SIZES = {digest: size(adapter) for digest, adapter in ADAPTERS.items()}


def make_pool(
    max_resident: int, max_bytes: int | None = None, *, sizes_known: bool = True
) -> tuple[AdapterPool, ManualLoads]:
    """A pool with all of ADAPTERS registered, with their true sizes or with 0 as an estimate."""
    pool = AdapterPool(tiny.injection(), max_resident, max_bytes)
    loads = ManualLoads()
    pool.executor = loads
    for digest, adapter in ADAPTERS.items():
        estimate = SIZES[digest] if sizes_known else 0
        pool.register(digest, lambda adapter=adapter: adapter, estimate)
    return pool, loads


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a model of it in plain Python: users, pinned and failing adapters."""

    @initialize(
        max_resident=st.integers(2, 4),
        share=st.sampled_from([None, 0.4, 0.7]),
        sizes_known=st.booleans(),
    )
    def start(self, max_resident: int, share: float | None, sizes_known: bool) -> None:
        """`share`: of the bytes of all adapters, as the limit."""
        self.max_bytes = None if share is None else int(share * sum(SIZES.values()))
        self.pool, self.loads = make_pool(max_resident, self.max_bytes, sizes_known=sizes_known)
        self.users: Counter[str] = Counter()
        self.pinned: set[str] = set()
        self.failing: set[str] = set()

    @rule(digest=registered)
    def register_again_broken_or_repaired(self, digest: str) -> None:
        self.failing ^= {digest}
        self.pool.register(digest, broken if digest in self.failing else lambda: ADAPTERS[digest])

    @rule(selections=st.lists(st.sampled_from(SELECTIONS + UNKNOWN), max_size=4))
    def prefetch(self, selections: list[AdapterSelection]) -> None:
        resident, num_loads = set(self.pool.resident()), len(self.loads.waiting)
        self.pool.prefetch(selections)
        evicted = resident - set(self.pool.resident())
        if evicted:
            assert len(self.loads.waiting) > num_loads, "evicted in vain"
            loading = [i for i, each in enumerate(selections) if self.pool.is_loading(each)]
            for i, selection in enumerate(selections):
                if evicted & set(selection):
                    assert min(loading) < i, "evicted for a request behind its own"

    @precondition(lambda self: self.loads.waiting)
    @rule()
    def end_a_load(self) -> None:
        self.loads.end_one()

    @rule(selection=st.sampled_from(SELECTIONS + UNKNOWN))
    def acquire(self, selection: AdapterSelection) -> None:
        digests = [digest for digest in selection if digest is not None]
        resident = set(digests) <= set(self.pool.resident())
        assert self.pool.acquire(selection) is resident
        if resident:
            self.users.update(digests)
            most_recent = self.pool.resident()[::-1][: len(digests)]
            assert set(most_recent) == set(digests), "not the most recently used"

    @precondition(lambda self: self.users.total())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.users.elements())))
        self.pool.release(AdapterSelection(digest))
        self.users[digest] -= 1

    @rule(digest=registered | st.just("unknown"), pin=st.booleans())
    def load_or_pin(self, digest: str, pin: bool) -> None:
        failure: Exception | None = None
        make_resident = self.pool.pin if pin else self.pool.load
        try:
            make_resident(digest)
        except (NotFound, DigestMismatch, AdapterPoolFull) as error:
            failure = error
        if pin and failure is None:
            self.pinned.add(digest)
        assert isinstance(failure, NotFound) == (digest == "unknown")
        assert (failure is None) == (digest in self.pool.resident())

    @rule(digest=registered)
    def unpin(self, digest: str) -> None:
        self.pool.unpin(digest)
        self.pinned.discard(digest)

    @rule(digest=registered | st.just("unknown"))
    def unload(self, digest: str) -> None:
        in_use = self.users[digest] > 0 or digest in self.pinned
        with pytest.raises(AdapterInUse) if in_use else nullcontext():
            self.pool.unload(digest)
            assert digest not in self.pool.resident()

    @rule()
    def take_failures(self) -> None:
        for digest, error in self.pool.take_failures().items():
            if digest == "unknown":
                assert isinstance(error, NotFound)
            else:
                assert isinstance(error, DigestMismatch | AdapterPoolFull)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_users() == self.users.total()
        assert self.pool.pinned == self.pinned
        in_use = {*self.users.elements(), *self.pinned}
        assert in_use <= set(self.pool.resident()), "an adapter in use is gone"
        for digest, lora in self.pool.loras.items():
            expected = served(ADAPTERS[digest]).pairs[PATH]
            assert torch.equal(lora.pairs[PATH].scaled_b, expected.scaled_b)

    def teardown(self) -> None:
        """Whatever happened: once nothing is used or pinned, every selection that fits loads."""
        for digest in self.users.elements():
            self.pool.release(AdapterSelection(digest))
        for digest in ADAPTERS:
            self.pool.unpin(digest)
            self.pool.register(digest, lambda digest=digest: ADAPTERS[digest])
        self.loads.end_all()
        self.pool.take_failures()
        for selection in SELECTIONS:
            self.check_that_it_loads_if_it_fits(selection)

    def check_that_it_loads_if_it_fits(self, selection: AdapterSelection) -> None:
        for _ in range(2):  # an adapter that is larger than estimated is tried again
            self.pool.prefetch([selection])
            self.loads.end_all()
        size = sum(SIZES[digest] for digest in selection if digest is not None)
        fits = self.max_bytes is None or size <= self.max_bytes
        assert self.pool.acquire(selection) is fits
        failures = [type(error) for error in self.pool.take_failures().values()]
        if fits:
            assert failures == []
            self.pool.release(selection)
        else:
            assert failures == [AdapterPoolFull]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    derandomize=True, max_examples=80, stateful_step_count=30, deadline=None
)


def test_the_least_recently_used_adapter_goes_but_not_for_a_request_behind_its_own() -> None:
    pool, loads = make_pool(2)
    pool.load("task-0")
    pool.load("task-1")
    assert pool.acquire(TASKS[0])
    pool.release(TASKS[0])
    pool.prefetch([TASKS[0], TASKS[2]])
    assert pool.resident() == ("task-0",)
    assert pool.is_loading(TASKS[2])
    pool.prefetch([TASKS[0], TASKS[2], TASKS[1]])
    loads.end_all()
    pool.prefetch([TASKS[0], TASKS[2], TASKS[1]])
    assert pool.resident() == ("task-0", "task-2")
    assert loads.waiting == []
    assert pool.counters.adapter_evictions == 1


def test_of_the_adapters_that_requests_wait_for_the_one_needed_last_goes_first() -> None:
    pool, loads = make_pool(2)
    pool.load("task-0")
    pool.load("task-2")
    pool.prefetch([TASKS[1], TASKS[0], TASKS[2]])
    loads.end_all()
    assert pool.resident() == ("task-0", "task-1")


def heavy(value: float, scaling: float = 1.0) -> Lora:
    out, in_ = tiny.injection().shapes[PATH]
    B = torch.full((out, 1), value, dtype=torch.float64)
    pair = LoraPair(torch.ones(1, in_), B, scaling)
    return Lora(LoraConfig(1, 1.0, ("q_proj",)), {PATH: pair})


@pytest.mark.parametrize(("value", "scaling"), [(1e300, 1.0), (3e38, 2.0)])
def test_weights_that_overflow_as_they_serve_are_refused_and_freed(
    value: float, scaling: float
) -> None:
    """In the dtype that serves, and scaled."""
    pool, loads = make_pool(2)
    adapter = heavy(value, scaling)
    freed = weakref.ref(adapter.pairs[PATH].B)
    pool.register("heavy", lambda only=[adapter]: only.pop())
    del adapter
    pool.prefetch([AdapterSelection("heavy")])
    loads.end_all()
    error = copy.copy(pool.take_failures()["heavy"])
    assert isinstance(error, InvalidAdapter)
    assert error.field == "weights"
    assert error.value == "infinite"
    assert error.allowed == "-3.4e+38 to 3.4e+38"
    assert pool.resident() == ()
    assert freed() is None


@pytest.mark.parametrize("way", ["unload", "evict"])
def test_an_unloaded_or_evicted_adapter_leaves_memory(way: str) -> None:
    pool, _ = make_pool(1)
    pool.register("copy", lambda: heavy(1.0))
    pool.load("copy")
    freed = weakref.ref(pool.loras["copy"].pairs[PATH].B)
    assert freed() is not None
    if way == "unload":
        pool.unload("copy")
    else:
        pool.load("task-0")
    assert freed() is None


@contextmanager
def unloading(pool: AdapterPool, wait_s: float) -> Iterator[Future]:
    """While task-0, which a sequence uses, is being unloaded and refuses new users."""
    pool.load("task-0")
    assert pool.acquire(TASKS[0])
    with ThreadPoolExecutor(1) as thread:
        unload = thread.submit(pool.unload, "task-0", wait_s=wait_s)
        while pool.acquire(TASKS[0]):
            pool.release(TASKS[0])
        yield unload


def test_an_unload_waits_for_the_users_and_lets_no_new_one_in() -> None:
    pool, _ = make_pool(2)
    changes: list[tuple[str, ...]] = []
    pool.on_change = lambda: changes.append(pool.resident())
    with unloading(pool, 10.0) as unload:
        assert not unload.done()
        pool.release(TASKS[0])
        unload.result(10)
    assert pool.resident() == ()
    assert changes[-1] == ()


def test_an_unload_aborts_the_users_once_no_new_one_can_start() -> None:
    pool, _ = make_pool(2)
    pool.load("task-0")
    assert pool.acquire(TASKS[0])
    starts: list[bool] = []

    def abort() -> None:
        starts.append(pool.acquire(TASKS[0]))
        pool.release(TASKS[0])

    pool.unload("task-0", wait_s=10.0, abort=abort)
    assert starts == [False]
    assert pool.resident() == ()


def test_an_unload_of_a_pinned_adapter_aborts_nobody() -> None:
    pool, _ = make_pool(2)
    pool.pin("task-0")
    aborted: list[bool] = []
    with pytest.raises(AdapterInUse, match="is pinned"):
        pool.unload("task-0", abort=lambda: aborted.append(True))
    assert aborted == []


def test_a_prefetch_that_fails_tells_the_engine_to_take_the_failure() -> None:
    pool, _ = make_pool(2)
    changes: list[bool] = []
    pool.on_change = lambda: changes.append(True)
    pool.prefetch([TASKS[0]])
    assert changes == []
    pool.prefetch([UNKNOWN[0]])
    assert changes == [True]
    assert list(pool.take_failures()) == ["unknown"]


def test_an_unload_gives_up_at_once_when_the_adapter_is_pinned() -> None:
    pool, _ = make_pool(2)
    with unloading(pool, 600.0) as unload:
        pool.pin("task-0")
        with pytest.raises(AdapterInUse, match="is pinned"):
            unload.result(10)


def test_an_adapter_still_in_use_after_the_wait_stays_and_takes_new_users() -> None:
    pool, _ = make_pool(2)
    pool.load("task-0")
    assert pool.acquire(TASKS[0])
    with pytest.raises(AdapterInUse, match="1 sequences"):
        pool.unload("task-0", wait_s=0.01)
    assert pool.acquire(TASKS[0])


def test_callers_that_want_the_same_adapter_share_one_load_and_hold_up_no_other() -> None:
    with closing(AdapterPool(tiny.injection(), 3)) as pool, ThreadPoolExecutor(8) as threads:
        may_end = threading.Event()
        loads: list[str] = []

        def load_slowly() -> Lora:
            loads.append("slow")
            assert may_end.wait(10)
            return ADAPTERS["task-0"]

        slow = AdapterSelection("slow")
        pool.register("slow", load_slowly)
        pool.register("task-1", lambda: ADAPTERS["task-1"])
        pool.load("task-1")
        pool.prefetch([slow])
        callers = [threads.submit(pool.load, "slow") for _ in range(8)]
        assert pool.acquire(TASKS[1])
        assert not pool.acquire(slow)
        may_end.set()
        for caller in callers:
            caller.result(10)
        assert loads == ["slow"]
        assert pool.acquire(slow)
        assert pool.num_users() == 2


def test_loads_compute_in_one_thread_whatever_the_engine_sets() -> None:
    pool = AdapterPool(tiny.injection(), 1)
    before = torch.get_num_threads()
    pool.executor.submit(int).result()  # the thread has started, and has not computed yet
    try:
        torch.set_num_threads(before + 1)
        assert pool.executor.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)
        pool.close()
