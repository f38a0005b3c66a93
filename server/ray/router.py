"""How Ray Serve finds the replica for a call of the ingress: by `choice.py`."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.ray.call import Call
from server.ray.choice import Candidate, by_preference

SENT_SECONDS = 5.0  # an adapter that was sent is taken to be in memory until the replica can say so
MEANT_SECONDS = 0.5  # a call that was meant for a replica counts as open until it is sent


@dataclass
class _Known:
    """What the router knows of a replica.

    Attributes:
        num_open: calls that were sent and have not ended.
        num_sent: calls that were sent.
        meant: calls that are about to be sent, with the time.
        sent_at: digests of adapters, with the time at which a call last needed them there.
    """

    num_open: int = 0
    num_sent: int = 0
    meant: dict[str, float] = field(default_factory=dict)
    sent_at: dict[str, float] = field(default_factory=dict)

    def candidate(self, name: str, resident: Iterable[str]) -> Candidate:
        """The replica as the choice sees it; forgets what is too long ago."""
        now = time.monotonic()
        self.meant = _since(now - MEANT_SECONDS, self.meant)
        self.sent_at = _since(now - SENT_SECONDS, self.sent_at)
        warm = frozenset(resident).union(self.sent_at)
        return Candidate(name, self.num_open + len(self.meant), self.num_sent, warm)


def _since(time_s: float, times: Mapping[str, float]) -> dict[str, float]:
    return {name: each for name, each in times.items() if each > time_s}


class AdapterRouter(RequestRouter):
    """Sends a call to the replica that has its adapters in memory and is not overloaded.

    Serve makes one in the process of each handle. Replicas tell it what they have in memory, about
    every second (`record_routing_stats`); between that it remembers what it has sent.
    """

    def initialize_state(self, affinity: bool = True, max_lead: int = 8) -> None:
        """Take the arguments of the deployment's configuration."""
        self._affinity = affinity
        self._max_lead = max_lead
        self._known: dict[str, _Known] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas, best first, each a rank of its own."""
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        self._known = {name: self._known.get(name, _Known()) for name in by_name}
        candidates = [
            self._known[name].candidate(name, each.routing_stats.get("resident", ()))
            for name, each in by_name.items()
        ]
        adapters = _adapters(pending_request) if self._affinity else frozenset[str]()
        found = by_preference(candidates, adapters, self._max_lead)
        if found and pending_request is not None:
            self._mean(self._known[found[0].name], pending_request)
        return [[by_name[each.name]] for each in found]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a call that has been sent."""
        super().on_send_request(replica_id)
        known = self._known.get(replica_id.unique_id)
        if known is not None:
            known.num_open += 1
            known.num_sent += 1

    def on_request_routed(self, pending_request: PendingRequest, *_: Any) -> None:
        """Note that a call has been sent: it is no longer meant to be."""
        for known in self._known.values():
            known.meant.pop(pending_request.metadata.internal_request_id, None)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count a call that has ended."""
        super().on_request_completed(replica_id, internal_request_id)
        known = self._known.get(replica_id.unique_id)
        if known is not None:
            known.num_open = max(0, known.num_open - 1)

    def _mean(self, known: _Known, pending: PendingRequest) -> None:
        """Note a call before it is sent: many are routed before the first of them is."""
        now = time.monotonic()
        for other in self._known.values():
            other.meant.pop(pending.metadata.internal_request_id, None)
        known.meant[pending.metadata.internal_request_id] = now
        known.sent_at |= dict.fromkeys(_adapters(pending), now)


def _adapters(pending: PendingRequest | None) -> frozenset[str]:
    """The digests that a call needs."""
    arguments: Sequence[object] = () if pending is None else pending.args
    calls = (each for each in arguments if isinstance(each, Call))
    return frozenset(digest for call in calls for digest in call.adapters)
