"""The way to the replicas, as the remote engine sees it: `serve_replicas.py` has Ray's."""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from crma.core.errors import CrmaError
from server.engine.inference_engine import ServedModel
from server.engine.request import Constraint
from server.ray.call import Call, Part, Status


class ReplicaDied(Exception):
    """A replica ended while it had a call."""


class Replicas(Protocol):
    """A changing number of replicas, each an `EngineReplica`.

    A call to one of them waits until there is one.
    """

    def generate(self, call: Call) -> AsyncGenerator[Part, None]:
        """Run a request in the replica that suits it best.

        Closing the generator aborts the request.

        Raises:
            ReplicaDied: from the generator. Parts may have come before.
        """
        ...

    async def check(self, constraint: Constraint) -> CrmaError | None:
        """Check a constraint in one replica. Returns what its engine raised.

        Raises:
            ReplicaDied: it ended meanwhile.
        """
        ...

    async def model(self) -> ServedModel:
        """What a replica serves. Raises ReplicaDied: it ended meanwhile."""
        ...

    async def every(self, act: str, *arguments: Any) -> list[tuple[Status, CrmaError | None]]:
        """Call a method of `EngineReplica` in all replicas that run now.

        Returns:
            The state of each that answered, and what its engine raised.

        Raises:
            TimeoutError: one does not answer.
        """
        ...
