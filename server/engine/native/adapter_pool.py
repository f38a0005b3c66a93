"""Adapters in memory, by digest: any number registered, a bounded number resident.

A running sequence *uses* its adapters, and an administrator may *pin* one; every other resident
may be evicted to make room.

The pool is thread-safe. Adapters load one at a time in a thread of its own, and the lock is never
held meanwhile. Requests wait for adapters in the engine's queue: nothing that the engine's thread
calls (`acquire`, `release`, `prefetch`, `is_loading`, `take_failures`) loads or waits.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial

from crma.core.errors import CrmaError, NotFound
from crma.core.selection import AdapterSelection
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Injection
from crma.method.lora import Lora
from crma.models.loading import compute_alone
from server.engine.errors import AdapterPoolFull
from server.engine.native.adapter_residents import AdapterResidents, digests_of
from server.engine.native.adapter_weights import Weights, prepare, size_in_bytes
from server.engine.native.side_stream import SideStream
from server.engine.request import PoolCounters

logger = logging.getLogger(__name__)

Loader = Callable[[], Lora | Backbone]
Loading = Future[Exception | None]  # of a load: the error, or None


class AdapterPool:
    """The registered adapters (a digest and its loader) and the resident ones (their weights).

    Args:
        injection: checks every adapter against the model.
        max_resident: limit on residents, task adapters and backbones together, and on what is
            being loaded beside them.
        max_bytes: limit on their weights in memory; None: no limit.

    Attributes:
        on_change: called without the lock, from any thread, when the engine may have something to
            do: a load, an unload or a pin has ended, or there are failures to take.
        loras: the resident task adapters; replaced, never changed, so that the engine's thread can
            read them without the lock.
        backbones: the resident backbones, likewise.
        executor: runs the loads in order, one at a time, and never inside `submit`.
        counters: since the start.
    """

    def __init__(
        self, injection: Injection, max_resident: int, max_bytes: int | None = None
    ) -> None:
        self.injection = injection
        self.on_change: Callable[[], None] = lambda: None
        self.loras: Mapping[str, Lora] = {}
        self.backbones: Mapping[str, list[FoldedPair]] = {}
        self.executor: Executor = ThreadPoolExecutor(1, "adapters", compute_alone)
        self.counters = PoolCounters()
        self._stream = SideStream(injection.model.device)
        # The only lock. It is notified when a user leaves or an adapter is pinned.
        self._lock = threading.Condition()
        self._loaders: dict[str, Loader] = {}
        max_size = math.inf if max_bytes is None else max_bytes
        self._residents = AdapterResidents(max_resident, max_size)
        self._loading: dict[str, Loading] = {}  # there is room for all of them
        self._wanted: dict[str, int] = {}  # digest -> place in the queue of waiting requests
        self._failures: dict[str, Exception] = {}

    @property
    def pinned(self) -> Set[str]:
        """The digests that administrators pinned; all of them are resident."""
        return self._residents.pinned

    def register(self, digest: str, loader: Loader, num_bytes: int = 0) -> None:
        """Make an adapter loadable, or replace its loader.

        A digest's content never changes, but the place to load it from may.

        Args:
            num_bytes: an estimate of its memory, used until it has been loaded once.
        """
        with self._lock:
            self._loaders[digest] = loader
            self._residents.sizes.setdefault(digest, num_bytes)

    def acquire(self, selection: AdapterSelection) -> bool:
        """Let a sequence use the adapters of its selection; to be undone by `release`.

        Returns:
            False, and nothing has changed, if one of them is not resident or is being unloaded.
        """
        digests = digests_of(selection)
        with self._lock:
            if not all(self._residents.is_usable(digest) for digest in digests):
                return False
            for digest in digests:
                self._residents.by_digest[digest].users += 1
                self._residents.touch(digest)
            return True

    def release(self, selection: AdapterSelection) -> None:
        """End a sequence's use of its adapters."""
        with self._lock:
            for digest in digests_of(selection):
                resident = self._residents.by_digest[digest]
                assert resident.users > 0
                resident.users -= 1
            self._lock.notify_all()

    def prefetch(self, selections: Iterable[AdapterSelection]) -> None:
        """Start the loads that waiting requests need, as far as there is room.

        Residents that are neither used nor pinned make room, except those that the request itself
        or one before it needs. If there is no room for a request, those behind it wait as well:
        they would take the room that it waits for.

        Args:
            selections: of all waiting requests, in the queue's order.
        """
        with self._lock:
            in_order = [digests_of(selection) for selection in dict.fromkeys(selections)]
            distinct = dict.fromkeys(digest for digests in in_order for digest in digests)
            self._wanted = {digest: place for place, digest in enumerate(distinct)}
            keep: set[str] = set()
            for digests in in_order:
                keep.update(digests)
                if not self._start_missing(digests, keep):
                    break
        if self._failures:
            self.on_change()

    def is_loading(self, selection: AdapterSelection) -> bool:
        """Whether an adapter of the selection is being loaded, rather than waiting for room."""
        return any(digest in self._loading for digest in digests_of(selection))

    def take_failures(self) -> dict[str, Exception]:
        """Return and forget the failures: digest -> NotFound, AdapterPoolFull or the load's error.

        While a failure is not taken, `prefetch` does not try its adapter again.
        """
        with self._lock:
            failures = self._failures
            self._failures = {}
            return failures

    def load(self, digest: str) -> None:
        """Make an adapter resident, and wait until it is.

        Residents that are neither used nor pinned make room; those that waiting requests need go
        last.

        Raises:
            NotFound: it is not registered.
            AdapterPoolFull: there is no room now.
            InvalidAdapter: it does not fit the model or its dtype.
            Exception: whatever the loader raises.
        """
        with self._lock:
            if digest in self._residents.by_digest:
                self._residents.touch(digest)
                return
            error = self._refusal([digest])
            if error is not None:
                raise error
            loading = self._loading.get(digest)
            if loading is None:
                loading = self._start(digest, keep=())
            if loading is None:
                raise self._residents.full([digest])
        failure = loading.result()
        if failure is not None:
            raise failure

    def pin(self, digest: str) -> None:
        """Load an adapter and keep it resident until `unpin`; pinning twice is pinning once.

        Raises:
            Exception: as `load`.
        """
        while True:
            self.load(digest)
            with self._lock:
                if digest in self._residents.by_digest:  # it may have been evicted since
                    self._residents.pinned.add(digest)
                    self._lock.notify_all()
                    return

    def unpin(self, digest: str) -> None:
        """Undo `pin`. Sequences that use the adapter keep it."""
        with self._lock:
            self._residents.pinned.discard(digest)
        self.on_change()

    def unload(
        self, digest: str, *, wait_s: float = 0.0, abort: Callable[[], None] | None = None
    ) -> None:
        """Free a resident adapter; does nothing if it is not resident.

        Args:
            wait_s: seconds to wait for the sequences that use it; no other can `acquire` it then.
            abort: makes these sequences end. Called once no other can `acquire` the adapter, unless
                it is pinned; without the lock.

        Raises:
            AdapterInUse: it is pinned, or still used after the wait; it stays resident.
        """
        with self._lock:
            resident = self._residents.by_digest.get(digest)
            if resident is None:
                return
            resident.unloads += 1
            is_pinned = digest in self.pinned
        if abort is not None and not is_pinned:
            abort()
        with self._lock:
            self._lock.wait_for(lambda: not resident.users or digest in self.pinned, wait_s)
            resident.unloads -= 1
            error = self._residents.in_use(digest, resident)
            still_resident = self._residents.by_digest.get(digest) is resident
            if error is None and still_resident:  # else another call has freed it meanwhile
                del self._residents.by_digest[digest]
                self._publish()
        self.on_change()
        if error is not None:
            raise error

    def close(self) -> None:
        """Cancel waiting loads and wait for the one that runs. The engine must have ended."""
        self.executor.shutdown(cancel_futures=True)

    def resident(self) -> tuple[str, ...]:
        """Digests in memory, least recently used first."""
        with self._lock:
            return tuple(self._residents.by_digest)

    def num_users(self) -> int:
        """Uses by running sequences; a sequence with a task adapter and a backbone counts twice."""
        with self._lock:
            return sum(resident.users for resident in self._residents.by_digest.values())

    def check_integrity(self) -> None:
        """Check the pool's invariants. Raises AssertionError."""
        with self._lock:
            self._residents.check_integrity(self._loading.keys())
            assert {**self.loras, **self.backbones} == self._weights()
            resident = self._residents.by_digest.keys()
            assert not resident & self._failures.keys()
            assert resident | self._loading.keys() <= self._loaders.keys()
            assert self._loaders.keys() == self._residents.sizes.keys()

    # The caller of the following holds the lock.

    def _start_missing(self, digests: list[str], keep: Set[str]) -> bool:
        """Start the loads that a waiting request needs. Returns False if one finds no room."""
        present = self._residents.by_digest.keys() | self._loading.keys()
        missing = [digest for digest in digests if digest not in present]
        has_failed = not self._failures.keys().isdisjoint(digests)
        if not missing or has_failed:
            return True
        error = self._refusal([*missing, *digests])  # the first is blamed: name a missing one
        if error is not None:
            self._failures[str(error.value)] = error
            return True
        return all(self._start(digest, keep) is not None for digest in missing)

    def _start(self, digest: str, keep: Collection[str]) -> Loading | None:
        """Make room and start a load. Returns None if there is no room."""
        if not self._make_room(digest, keep):
            return None
        loading = self.executor.submit(self._load, digest, frozenset(keep))
        self._loading[digest] = loading
        return loading

    def _make_room(self, digest: str, keep: Collection[str]) -> bool:
        """Evict residents, but none of `keep`, until an adapter fits; none if it cannot fit."""
        victims = self._residents.victims({*self._loading, digest}, keep, self._wanted)
        if victims is None:
            return False
        for victim in victims:
            del self._residents.by_digest[victim]
        self.counters.adapter_evictions += len(victims)
        self._publish()
        return True

    def _refusal(self, digests: Collection[str]) -> NotFound | AdapterPoolFull | None:
        """Say why adapters cannot be resident together, even if no sequence ran.

        Returns:
            An error whose `value` is the digest to blame; None: they can.
        """
        for digest in digests:
            if digest not in self._loaders:
                message = f"adapter {digest} is not registered"
                return NotFound(
                    message, field="digest", value=digest, allowed="a registered digest"
                )
        if self._residents.exceeds_limits({*digests, *self.pinned}):
            return self._residents.full(digests)
        return None

    def _weights(self) -> dict[str, Weights]:
        return {d: resident.weights for d, resident in self._residents.by_digest.items()}

    def _publish(self) -> None:
        """Show the engine's thread what is resident; to be called after every change of it."""
        weights = self._weights()
        self.loras = {d: served for d, served in weights.items() if isinstance(served, Lora)}
        self.backbones = {d: served for d, served in weights.items() if isinstance(served, list)}

    # In the thread of the loads, without the lock.

    def _load(self, digest: str, keep: frozenset[str]) -> Exception | None:
        """Load an adapter and make it resident.

        Returns:
            The error, if any. AdapterPoolFull, for an adapter larger than its estimate, is not
            kept for `take_failures`: the next `prefetch` knows its size and decides.
        """
        started = time.perf_counter()
        result = self._read(digest)
        with self._lock:
            del self._loading[digest]
            if isinstance(result, Exception):
                self._failures[digest] = result
                error: Exception | None = result
            else:
                error = self._admit(digest, result, keep, started)
        self.on_change()
        return error

    def _read(self, digest: str) -> Weights | Exception:
        try:
            return self.prepared(self._loaders[digest]())
        except Exception as error:
            unexpected = not isinstance(error, CrmaError)
            logger.warning("adapter %s: %s", digest, error, exc_info=unexpected)
            return error.with_traceback(None)  # its frames would keep the weights in memory

    def prepared(self, adapter: Lora | Backbone) -> Weights:
        """An adapter as it is kept. Raises as `prepare`."""
        return self._stream.load(partial(prepare, adapter, self.injection))

    def _admit(
        self, digest: str, weights: Weights, keep: frozenset[str], started: float
    ) -> AdapterPoolFull | None:
        """Make loaded weights resident, with the lock held. Returns an error if they do not fit."""
        self._residents.sizes[digest] = size_in_bytes(weights)
        if not self._make_room(digest, keep):
            return self._residents.full([digest])
        self._residents.add(digest, weights)
        self._failures.pop(digest, None)
        self._publish()
        self.counters.adapter_loads += 1
        self.counters.adapter_load_seconds += time.perf_counter() - started
        return None
