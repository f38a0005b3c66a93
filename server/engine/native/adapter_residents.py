"""Which adapters are in memory, which of them must stay, and which go first to make room.

Plain data without a lock: `AdapterPool` holds its own lock around every call.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from crma.core.selection import AdapterSelection
from server.engine.errors import AdapterInUse, AdapterPoolFull
from server.engine.native.adapter_weights import Weights, size_in_bytes


@dataclass(eq=False)
class Resident:
    """An adapter in memory.

    Attributes:
        users: running sequences that use it.
        unloads: calls of `AdapterPool.unload` that wait for them to end.
    """

    weights: Weights
    users: int = 0
    unloads: int = 0


class AdapterResidents:
    """The resident adapters and the limits on them.

    Args:
        max_resident: limit on their number.
        max_bytes: limit on their bytes.

    Attributes:
        by_digest: the residents, least recently used first.
        pinned: the digests that administrators pinned.
        sizes: bytes of each registered adapter; an estimate until it has been loaded once.
    """

    def __init__(self, max_resident: int, max_bytes: float) -> None:
        self.max_resident = max_resident
        self.max_bytes = max_bytes
        self.by_digest: OrderedDict[str, Resident] = OrderedDict()
        self.pinned: set[str] = set()
        self.sizes: dict[str, int] = {}

    def add(self, digest: str, weights: Weights) -> None:
        """Add an adapter that nobody uses, as the most recently used."""
        self.by_digest[digest] = Resident(weights)

    def is_usable(self, digest: str) -> bool:
        """Whether a sequence may begin to use an adapter: it is resident and not being unloaded."""
        resident = self.by_digest.get(digest)
        return resident is not None and not resident.unloads

    def touch(self, digest: str) -> None:
        """Make a resident the most recently used."""
        self.by_digest.move_to_end(digest)

    def exceeds_limits(self, digests: Collection[str]) -> bool:
        """Whether these adapters are too many or too large to be resident together."""
        size = sum(self.sizes[digest] for digest in digests)
        return len(digests) > self.max_resident or size > self.max_bytes

    def victims(
        self, incoming: Collection[str], keep: Collection[str], wanted: Mapping[str, int]
    ) -> list[str] | None:
        """Choose the residents that must be evicted so that others fit.

        First go those that no request waits for, the least recently used first; then those that
        are needed last.

        Args:
            incoming: digests that need room: the next one to load, and those being loaded.
            keep: residents not to choose, besides those that are used or pinned.
            wanted: digest -> place in the queue of waiting requests.

        Returns:
            As few as possible in that order; None if evicting all of them would not be enough.
        """
        staying = {*self.by_digest, *incoming}
        victims = []
        for candidate in self._evictable(keep, wanted):
            if not self.exceeds_limits(staying):
                break
            staying.remove(candidate)
            victims.append(candidate)
        return None if self.exceeds_limits(staying) else victims

    def _evictable(self, keep: Collection[str], wanted: Mapping[str, int]) -> list[str]:
        unused = [digest for digest, resident in self.by_digest.items() if not resident.users]
        evictable = [d for d in unused if d not in self.pinned and d not in keep]
        # The sort is stable: within the same place, the least recently used stays first.
        evictable.sort(key=lambda d: -wanted.get(d, math.inf))
        return evictable

    def full(self, digests: Collection[str]) -> AdapterPoolFull:
        """The error for adapters that have no room; its `value` is the first of them."""
        distinct = list(dict.fromkeys(digests))
        size = sum(self.sizes[digest] for digest in distinct)
        names = " + ".join(distinct)
        message = f"no room for {names} ({size} bytes) beside adapters that are in use or pinned"
        limits = f"at most {self.max_resident} adapters, {self.max_bytes} bytes together"
        return AdapterPoolFull(message, field="digest", value=distinct[0], allowed=limits)

    def in_use(self, digest: str, resident: Resident) -> AdapterInUse | None:
        """The error for unloading a resident that is pinned or used; None if it is neither."""
        if digest in self.pinned:
            reason = "pinned"
        elif resident.users:
            reason = f"in use by {resident.users} sequences"
        else:
            return None
        return AdapterInUse(
            f"adapter {digest} is {reason}",
            field="digest",
            value=digest,
            allowed="an adapter that is neither in use nor pinned",
        )

    def check_integrity(self, loading: Collection[str]) -> None:
        """Check the invariants of residents and limits. Raises AssertionError."""
        for digest, resident in self.by_digest.items():
            assert resident.users >= 0
            assert resident.unloads >= 0
            assert self.sizes[digest] == size_in_bytes(resident.weights)
        assert self.pinned <= self.by_digest.keys()
        assert not self.by_digest.keys() & set(loading)
        assert not self.exceeds_limits([*self.by_digest, *loading])


def digests_of(selection: AdapterSelection) -> list[str]:
    """The adapters of a selection, without None."""
    return [digest for digest in selection if digest is not None]
