"""Adapters in memory, by digest: loaded on demand, pinned while requests use them, evicted least recently used first.

Thread-safe. Loading runs in the caller's thread, never in the engine's.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from crma.adapter import Backbone, FoldedPair
from crma.errors import NotFound
from crma.injection import Injection
from crma.lora import Lora
from crma.selection import AdapterSelection
from server.engine.request import EngineError

Loader = Callable[[], Lora | Backbone]


class AdapterInUse(EngineError):
    """An adapter that requests use, or that is pinned, cannot be unloaded."""


class PoolStats(NamedTuple):
    """Counters since the start."""

    loads: int
    load_seconds: float
    evictions: int


@dataclass
class _Resident:
    weights: Lora | list[FoldedPair]
    pins: int = 0


class AdapterPool:
    """What is registered (a digest and how to load it) and what is resident (its weights, as they serve).

    Args:
        injection: checks every adapter against the model and says device and dtype.
        max_resident: residents kept; only unpinned ones are evicted, so running requests may hold more.
    """

    def __init__(self, injection: Injection, max_resident: int) -> None:
        self.injection = injection
        self.max_resident = max_resident
        self._lock = threading.RLock()
        self._loading = threading.Lock()
        self._loaders: dict[str, Loader] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        self._stats = PoolStats(0, 0.0, 0)
        # Read by the engine's thread without the lock; replaced, never changed.
        self.loras: Mapping[str, Lora] = {}
        self.backbones: Mapping[str, list[FoldedPair]] = {}

    def register(self, digest: str, loader: Loader) -> None:
        """Make a digest loadable. Content never changes under a digest, so the first loader stays."""
        with self._lock:
            self._loaders.setdefault(digest, loader)

    def load(self, digest: str) -> None:
        """Make an adapter resident. Raises NotFound, or what its loader or the check against the model raises."""
        self.pin(digest)
        self.unpin(digest)

    def pin(self, digest: str) -> None:
        """Make resident if needed, and keep so until unpinned as often."""
        with self._loading:  # one load at a time; a second request for the same digest waits for the first
            with self._lock:
                if self._pin_resident(digest):
                    return
                if digest not in self._loaders:
                    raise NotFound(
                        "adapter is not registered", field="digest", value=digest, allowed=sorted(self._loaders)
                    )
                loader = self._loaders[digest]
            started = time.perf_counter()
            weights = self._as_served(loader())
            with self._lock:
                self._resident[digest] = _Resident(weights)
                loads, seconds, evictions = self._stats
                self._stats = PoolStats(loads + 1, seconds + time.perf_counter() - started, evictions)
                self._pin_resident(digest)
                self._evict()
                self._publish()

    def unpin(self, digest: str) -> None:
        """Give back one pin."""
        with self._lock:
            resident = self._resident[digest]
            assert resident.pins > 0
            resident.pins -= 1
            if self._evict():
                self._publish()

    def pin_if_resident(self, selection: AdapterSelection) -> bool:
        """Pin both adapters of a selection if that takes no loading; never waits for another's load."""
        digests = [digest for digest in selection if digest is not None]
        with self._lock:
            return all(digest in self._resident for digest in digests) and all(map(self._pin_resident, digests))

    def pin_selection(self, selection: AdapterSelection) -> None:
        """Pin both adapters of a selection, or neither; blocks while they load."""
        digests = [digest for digest in selection if digest is not None]
        for i, digest in enumerate(digests):
            try:
                self.pin(digest)
            except BaseException:
                for pinned in digests[:i]:
                    self.unpin(pinned)
                raise

    def unpin_selection(self, selection: AdapterSelection) -> None:
        """Give back what `pin_selection` took."""
        for digest in selection:
            if digest is not None:
                self.unpin(digest)

    def unload(self, digest: str) -> None:
        """Free a resident adapter; no-op if it is not resident. Raises AdapterInUse while it is pinned."""
        with self._lock:
            resident = self._resident.get(digest)
            if resident is None:
                return
            if resident.pins:
                raise AdapterInUse(f"adapter {digest} is in use by {resident.pins} requests or pins")
            del self._resident[digest]
            self._publish()

    def resident(self) -> tuple[str, ...]:
        """Digests in memory, least recently used first."""
        with self._lock:
            return tuple(self._resident)

    def stats(self) -> PoolStats:
        """Counters since the start."""
        with self._lock:
            return self._stats

    def check_integrity(self) -> None:
        """No negative pins; what the engine sees is what is resident; over the limit only while pinned."""
        with self._lock:
            assert all(r.pins >= 0 for r in self._resident.values())
            assert set(self.loras) | set(self.backbones) == set(self._resident)
            unpinned = [d for d, r in self._resident.items() if not r.pins]
            assert len(self._resident) <= self.max_resident or not unpinned

    def num_pins(self) -> int:
        """Pins held by requests and by administrators."""
        with self._lock:
            return sum(r.pins for r in self._resident.values())

    def _pin_resident(self, digest: str) -> bool:
        if digest not in self._resident:
            return False
        self._resident[digest].pins += 1
        self._resident.move_to_end(digest)
        return True

    def _evict(self) -> bool:
        surplus = len(self._resident) - self.max_resident
        victims = [d for d, r in self._resident.items() if not r.pins][: max(0, surplus)]
        for digest in victims:
            del self._resident[digest]
        loads, seconds, evictions = self._stats
        self._stats = PoolStats(loads, seconds, evictions + len(victims))
        return bool(victims)

    def _publish(self) -> None:
        self.loras = {d: r.weights for d, r in self._resident.items() if isinstance(r.weights, Lora)}
        self.backbones = {d: r.weights for d, r in self._resident.items() if isinstance(r.weights, list)}

    def _as_served(self, adapter: Lora | Backbone) -> Lora | list[FoldedPair]:
        parameter = next(self.injection.model.parameters())
        device, dtype = parameter.device, parameter.dtype
        if isinstance(adapter, Backbone):
            self.injection.check_backbone(adapter.config.num_layers, adapter.config.hidden_size)
            return adapter.folded(device, dtype)
        self.injection.check(adapter)
        with torch.no_grad():
            return adapter.to(device, dtype)
