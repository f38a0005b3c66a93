"""Replicas in this process, for tests of the remote engine: the same calls, and no Ray."""

import asyncio
import pickle
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from crma.core.errors import CrmaError
from server.engine.inference_engine import InferenceEngine, ServedModel
from server.engine.request import Constraint
from server.ray.call import Call, Part, Status
from server.ray.engine_replica import EngineReplica
from server.ray.remote_engine import RemoteEngine
from server.ray.replicas import ReplicaDied

T = TypeVar("T")


def crossed(value: T) -> T:
    """What another process would receive."""
    received: T = pickle.loads(pickle.dumps(value))
    return received


class InProcessReplicas:
    """`Replicas` whose engines are here. A call goes to the first that lives.

    Attributes:
        members: those that run.
        calls: (name of the replica, id of the request) of every call.
        dying: names of replicas that end at the next part of a call, or before the first.
    """

    def __init__(self, members: Sequence[EngineReplica] = ()) -> None:
        self.members = list(members)
        self.calls: list[tuple[str, str]] = []
        self.dying: dict[str, int] = {}

    async def generate(self, call: Call) -> AsyncGenerator[Part, None]:
        member = self.members[0]
        self.calls.append((member.name, call.request.id))
        num_left = self.dying.get(member.name)
        async with aclosing(member.generate(crossed(call))) as parts:
            async for part in parts:
                if num_left == 0:
                    self.members.remove(member)
                    raise ReplicaDied(member.name)
                if num_left is not None:
                    num_left -= 1
                yield crossed(part)

    async def check(self, constraint: Constraint) -> CrmaError | None:
        return crossed(await self.members[0].check(crossed(constraint)))

    async def model(self) -> ServedModel:
        return self.members[0].model()

    async def every(self, act: str, *arguments: Any) -> list[tuple[Status, CrmaError | None]]:
        answers = (getattr(member, act)(*arguments) for member in self.members)
        return [crossed(answer) for answer in await asyncio.gather(*answers)]


class ClosingRemoteEngine(RemoteEngine):
    """A remote engine that ends its replicas too."""

    async def close(self) -> None:
        await super().close()
        for member in self._replicas.members:  # type: ignore[attr-defined]
            await member.engine.close()


def remote_engine(
    engines: Sequence[InferenceEngine],
    *,
    max_running: int = 4,
    max_queue: int = 8,
    max_model_len: int = 128,
) -> tuple[ClosingRemoteEngine, InProcessReplicas]:
    """A remote engine on replicas of these engines, named r0, r1 and so on."""
    replicas = InProcessReplicas()
    model = replace(engines[0].model, max_model_len=max_model_len)
    remote = ClosingRemoteEngine(replicas, model, max_running=max_running, max_queue=max_queue)
    replicas.members = [
        EngineReplica(f"r{number}", engine, remote.adapter) for number, engine in enumerate(engines)
    ]
    return remote, replicas
