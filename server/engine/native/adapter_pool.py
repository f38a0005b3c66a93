"""Adapters in memory, by digest: thousands registered, a bounded number resident, pinned while requests use them.

Thread-safe, and the lock is never held while an adapter loads: that is done one at a time, in a thread of the pool's
own. Requests wait for adapters in the engine's queue: nothing that the engine's thread calls loads or waits.
"""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from crma.core.errors import CrmaError, InvalidAdapter, NotFound
from crma.core.selection import AdapterSelection
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Injection
from crma.method.lora import Lora
from crma.models.loading import compute_alone
from server.engine.errors import AdapterInUse, AdapterPoolFull
from server.engine.native.lora_stack import LoraStack, Site
from server.engine.request import PoolCounters

logger = logging.getLogger(__name__)

Loader = Callable[[], Lora | Backbone]
Weights = Lora | list[FoldedPair]


@dataclass(eq=False)
class _Resident:
    """`users`: running sequences that use it; `leaving`: unloads that wait for those to end."""

    weights: Weights
    users: int = 0
    leaving: int = 0


class AdapterPool:
    """What is registered (a digest and how to load it) and what is resident (its weights, as they serve).

    Args:
        injection: checks every adapter against the model and says device and dtype.
        max_resident: most residents, task adapters and backbones together; what is being loaded counts.
        max_bytes: most bytes of weights as they serve, of the same; None: no limit.

    Attributes:
        on_change: called without the lock, by any thread, when what the engine waits for may have come: a load ended,
            well or badly, an unload or a hold is over, or there is a failure to take.
        loras, backbones: the residents. Read by the engine's thread without the lock; replaced, never changed.
        executor: runs the loads, one at a time and in order, never inside `submit`. `close` ends it.
        pinned: what administrators keep resident.
        counters: since the start.
    """

    def __init__(
        self, injection: Injection, max_resident: int, max_bytes: int | None = None
    ) -> None:
        self.injection = injection
        self.max_resident = max_resident
        self.max_bytes = math.inf if max_bytes is None else max_bytes
        self.on_change: Callable[[], None] = lambda: None
        self.loras: Mapping[str, Lora] = {}
        self.backbones: Mapping[str, list[FoldedPair]] = {}
        self.executor: Executor = ThreadPoolExecutor(1, "adapters", compute_alone)
        self.pinned: set[str] = set()
        self._changed = (
            threading.Condition()
        )  # the one lock; notified when pins are given back and holds are taken
        self._loaders: dict[str, Loader] = {}
        self._sizes: dict[
            str, int
        ] = {}  # bytes: an estimate until a load has shown the true number
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._loading: dict[str, Future[Exception | None]] = {}  # room for them is made
        self._wanted: dict[str, int] = {}  # digest -> its place in the queue
        self._failures: dict[str, Exception] = {}
        self._stack: LoraStack | None = None
        self.counters = PoolCounters()

    def register(self, digest: str, loader: Loader, num_bytes: int = 0) -> None:
        """Make a digest loadable. Its content never changes, but where it lies may: the last loader counts.

        Args:
            num_bytes: about what it takes as it serves; the true number is known once it has been loaded.
        """
        with self._changed:
            self._loaders[digest] = loader
            self._sizes.setdefault(digest, num_bytes)

    def acquire(self, selection: AdapterSelection) -> bool:
        """Pin both adapters of a selection if they are resident and none is being unloaded; else take nothing."""
        digests = _digests(selection)
        with self._changed:
            found = [self._resident.get(digest) for digest in digests]
            if any(resident is None or resident.leaving for resident in found):
                return False
            for digest in digests:
                self._resident[digest].users += 1
                self._resident.move_to_end(digest)
            return True

    def release(self, selection: AdapterSelection) -> None:
        """Give back what `acquire` took."""
        with self._changed:
            for digest in _digests(selection):
                assert self._resident[digest].users > 0
                self._resident[digest].users -= 1
            self._changed.notify_all()

    def prefetch(self, selections: Iterable[AdapterSelection]) -> None:
        """Say all that waits, in the queue's order: what is missing begins to load as far as there is room.

        What is not pinned makes room, but not for what waits behind, or with, its own user. Where the first that is
        missing finds no room, those behind it wait too: they would take its room.
        """
        with self._changed:
            in_order = [_digests(selection) for selection in dict.fromkeys(selections)]
            self._wanted = {
                d: i
                for i, d in enumerate(dict.fromkeys(d for digests in in_order for d in digests))
            }
            keep: set[str] = set()
            for digests in in_order:
                keep.update(digests)
                missing = [d for d in digests if d not in self._resident and d not in self._loading]
                if not missing or not self._failures.keys().isdisjoint(digests):
                    continue
                if error := self._refusal([*missing, *digests]):
                    self._failures[str(error.value)] = error
                elif not all(self._begin(digest, keep) for digest in missing):
                    break
        if self._failures:
            self.on_change()

    def stack(self, digests: Set[str], sites: Iterable[Site]) -> LoraStack:
        """Copies, beyond `max_bytes`, of these pinned task adapters side by side; the last made, if it has them all."""
        if (stack := self._stack) is None or not digests <= stack.index.keys():
            loras = {digest: self.loras[digest] for digest in sorted(digests)}
            stack = self._stack = LoraStack(loras, sites, self.injection.shapes)
        return stack

    def is_loading(self, selection: AdapterSelection) -> bool:
        """Whether an adapter of it is being loaded: then it is not for want of room that it waits."""
        return any(digest in self._loading for digest in _digests(selection))

    def take_failures(self) -> dict[str, Exception]:
        """Digest -> why what waits for it waits in vain, each given once; the next `prefetch` of it tries again.

        NotFound, AdapterPoolFull (no room beside what is held), or what the load raised.
        """
        with self._changed:
            failures, self._failures = self._failures, {}
            return failures

    def load(self, digest: str) -> None:
        """Make an adapter resident; blocks. What is not pinned makes room, what is waited for last.

        Raises:
            NotFound, AdapterPoolFull: it cannot be had, or not now.
            Exception: what the loader raises; InvalidAdapter if it does not fit the model or the dtype that serves.
        """
        with self._changed:
            if digest in self._resident:
                self._resident.move_to_end(digest)
                return
            if error := self._refusal([digest]):
                raise error
            loading = self._loading.get(digest) or self._begin(digest, ())
            if loading is None:
                raise self._full([digest])
        if failure := loading.result():
            raise failure

    def pin(self, digest: str) -> None:
        """An administrator's pin: load, and keep until `unpin`. Once is enough. Raises as `load`."""
        while True:
            self.load(digest)
            with self._changed:
                if digest in self._resident:  # not evicted again before it was held
                    self.pinned.add(digest)
                    return self._changed.notify_all()

    def unpin(self, digest: str) -> None:
        """Take back `pin`, never a request's own pin."""
        with self._changed:
            self.pinned.discard(digest)
        self.on_change()

    def unload(self, digest: str, *, wait_s: float = 0.0) -> None:
        """Free a resident adapter; no-op if it is not resident, or on its way.

        Args:
            wait_s: longest wait for requests that use it; meanwhile no other can `acquire` it.

        Raises:
            AdapterInUse: at once if it is held, after the wait if it is pinned; it stays as it was.
        """
        with self._changed:
            if (resident := self._resident.get(digest)) is None:
                return
            resident.leaving += 1
            self._changed.wait_for(lambda: not resident.users or digest in self.pinned, wait_s)
            resident.leaving -= 1
            in_use = resident.users > 0 or digest in self.pinned
            if (
                not in_use and self._resident.get(digest) is resident
            ):  # else another freed it meanwhile
                del self._resident[digest]
                self._publish()
        self.on_change()
        if in_use:
            message = f"adapter {digest} is in use by {resident.users} sequences, or held"
            raise AdapterInUse(
                message, field="digest", value=digest, allowed="an adapter that is not in use"
            )

    def close(self) -> None:
        """Load nothing more; waits for the load under way and ends the thread. For when the engine has ended."""
        self.executor.shutdown(cancel_futures=True)

    def resident(self) -> tuple[str, ...]:
        """Digests in memory, least recently used first."""
        with self._changed:
            return tuple(self._resident)

    def num_users(self) -> int:
        """Pins of running sequences, which take one on each adapter that they use."""
        with self._changed:
            return sum(resident.users for resident in self._resident.values())

    def check_integrity(self) -> None:
        """AssertionError unless limits hold, with what loads, sizes are true, and the engine sees what is resident."""
        with self._changed:
            weights = {digest: resident.weights for digest, resident in self._resident.items()}
            assert all(
                resident.users >= 0 and resident.leaving >= 0
                for resident in self._resident.values()
            )
            assert {**self.loras, **self.backbones} == weights
            assert {digest: self._sizes[digest] for digest in weights} == {
                d: _num_bytes(w) for d, w in weights.items()
            }
            assert not weights.keys() & (self._loading.keys() | self._failures.keys())
            assert self.pinned <= weights.keys()
            assert (
                weights.keys() | self._loading.keys() <= self._loaders.keys() == self._sizes.keys()
            )
            assert not self._over([*weights, *self._loading])

    # With the lock held ----------------------------------------------------------------------------------------------

    def _begin(self, digest: str, keep: Collection[str]) -> Future[Exception | None] | None:
        """Make room, without what is to be kept, and load; None: no room."""
        if not self._make_room(digest, keep):
            return None
        self._loading[digest] = self.executor.submit(self._load, digest, frozenset(keep))
        return self._loading[digest]

    def _make_room(self, digest: str, keep: Collection[str]) -> bool:
        """Evict what must go for a digest, and nothing in vain.

        First what nobody waits for, the least recently used first; then what is needed last.
        """
        evictable = [
            d for d, r in self._resident.items() if not (r.users or d in self.pinned or d in keep)
        ]
        staying, victims = {*self._resident, *self._loading, digest}, []
        for victim in sorted(evictable, key=lambda d: -self._wanted.get(d, math.inf)):
            if not self._over(staying):
                break
            staying.remove(victim)
            victims.append(victim)
        if self._over(staying):
            return False
        for victim in victims:
            del self._resident[victim]
        self.counters.adapter_evictions += len(victims)
        self._publish()
        return True

    def _over(self, digests: Collection[str]) -> bool:
        """Whether so many, or so large ones, must not be resident together."""
        return (
            len(digests) > self.max_resident
            or sum(self._sizes[d] for d in digests) > self.max_bytes
        )

    def _refusal(self, digests: Collection[str]) -> NotFound | AdapterPoolFull | None:
        """Why these cannot all be resident, even if no request ran; its `value` is the one to blame."""
        for digest in digests:
            if digest not in self._loaders:
                message = f"adapter {digest} is not registered"
                return NotFound(
                    message, field="digest", value=digest, allowed="a registered digest"
                )
        return self._full(digests) if self._over({*digests, *self.pinned}) else None

    def _full(self, digests: Collection[str]) -> AdapterPoolFull:
        digests = list(dict.fromkeys(digests))
        size = sum(self._sizes[digest] for digest in digests)
        message = f"no room for {' + '.join(digests)}, {size} bytes, beside what is in use or held"
        limits = f"at most {self.max_resident} adapters of {self.max_bytes} bytes together"
        return AdapterPoolFull(message, field="digest", value=digests[0], allowed=limits)

    def _publish(self) -> None:
        """The one place where residency changes for the engine's thread."""
        self.loras = {
            d: r.weights for d, r in self._resident.items() if isinstance(r.weights, Lora)
        }
        self.backbones = {
            d: r.weights for d, r in self._resident.items() if isinstance(r.weights, list)
        }
        if self._stack is not None and not self._stack.index.keys() <= self.loras.keys():
            self._stack = None  # it holds a copy of what is gone

    # In the thread of the loads --------------------------------------------------------------------------------------

    def _load(self, digest: str, keep: frozenset[str]) -> Exception | None:
        """What went wrong; None: it is resident. Finding no room after all is for `prefetch` to try again."""
        started, weights = time.perf_counter(), None
        error: Exception | None = None
        try:
            weights = self._as_served(self._loaders[digest]())
        except Exception as caught:
            logger.warning(
                "adapter %s: %s", digest, caught, exc_info=not isinstance(caught, CrmaError)
            )
            error = caught.with_traceback(None)  # its frames would keep what was read
        with self._changed:
            del self._loading[digest]
            if weights is not None:
                self._sizes[digest] = _num_bytes(weights)
                if self._make_room(digest, keep):
                    self._resident[digest] = _Resident(weights)
                    self.counters.adapter_loads += 1
                    self.counters.adapter_load_seconds += time.perf_counter() - started
                    self._failures.pop(digest, None)
                    self._publish()
                else:
                    error = self._full([digest])
            elif error is not None:
                self._failures[digest] = error
        self.on_change()
        return error

    def _as_served(self, adapter: Lora | Backbone) -> Weights:
        """On the model's device, in its dtype. Raises InvalidAdapter for what does not fit."""
        weights: Weights
        model = self.injection.model
        if isinstance(adapter, Backbone):
            self.injection.check_backbone(adapter.config.num_layers, adapter.config.hidden_size)
            weights = adapter.folded(model.device, model.dtype)
        else:
            self.injection.check(adapter)
            weights = adapter.to(model.device, model.dtype)
        if not all(tensor.isfinite().all() for tensor in _tensors(weights)):
            message, limit = (
                f"weights overflow in {model.dtype}, which serves",
                torch.finfo(model.dtype).max,
            )
            raise InvalidAdapter(
                message, field="weights", value="infinite", allowed=f"-{limit:.3g} to {limit:.3g}"
            )
        return weights


def _digests(selection: AdapterSelection) -> list[str]:
    return [digest for digest in selection if digest is not None]


def _tensors(weights: Weights) -> list[torch.Tensor]:
    return (
        weights.parameters()
        if isinstance(weights, Lora)
        else [tensor for pair in weights for tensor in pair]
    )


def _num_bytes(weights: Weights) -> int:
    return sum(tensor.nbytes for tensor in _tensors(weights))
