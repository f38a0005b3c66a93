"""How Ray Serve finds the replica for a call of the ingress: by `choice.py`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.ray.call import Call
from server.ray.choice import Candidate, by_preference

SENT_SECONDS = 5.0  # an adapter that was sent is taken to be in memory until the replica can say so


@dataclass
class _Known:
    """What the router knows of a replica: its open requests, and when it was sent adapters."""

    open: set[str] = field(default_factory=set)
    num_sent: int = 0
    sent_at: dict[str, float] = field(default_factory=dict)

    def recently_sent(self) -> frozenset[str]:
        """The digests that were sent lately; forgets the others."""
        since = time.monotonic() - SENT_SECONDS
        self.sent_at = {digest: sent for digest, sent in self.sent_at.items() if sent > since}
        return frozenset(self.sent_at)


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
        candidates = [self._candidate(name, each) for name, each in by_name.items()]
        adapters = _adapters(pending_request) if self._affinity else frozenset[str]()
        found = by_preference(candidates, adapters, self._max_lead)
        if found and pending_request is not None:
            # Noted before it is sent: the next call, which may be next to be routed, follows it.
            self._note(found[0].name, pending_request)
        return [[by_name[each.name]] for each in found]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, _: Any
    ) -> None:
        """Note where a call went."""
        self._note(replica_id.unique_id, pending_request)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a call has ended."""
        known = self._known.get(replica_id.unique_id)
        if known is not None:
            known.open.discard(internal_request_id)

    def _note(self, name: str, pending: PendingRequest) -> None:
        known = self._known.get(name)
        if known is None:
            return
        this_id = pending.metadata.internal_request_id
        if this_id not in known.open:
            for other in self._known.values():
                other.open.discard(this_id)  # it had been meant to go there
            known.open.add(this_id)
            known.num_sent += 1
        known.sent_at |= dict.fromkeys(_adapters(pending), time.monotonic())

    def _candidate(self, name: str, replica: RunningReplica) -> Candidate:
        known = self._known[name]
        resident = replica.routing_stats.get("resident", ())
        warm = known.recently_sent().union(resident)
        return Candidate(name, len(known.open), known.num_sent, warm)


def _adapters(pending: PendingRequest | None) -> frozenset[str]:
    """The digests that a call needs."""
    arguments: Sequence[object] = () if pending is None else pending.args
    calls = (each for each in arguments if isinstance(each, Call))
    return frozenset(digest for call in calls for digest in call.adapters)
