"""The replicas as Ray Serve runs them."""

from collections.abc import AsyncGenerator
from contextvars import Context
from typing import Any, cast

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from crma.core.errors import CrmaError
from server.engine.inference_engine import ServedModel
from server.engine.request import Constraint
from server.ray.call import Call, Part, Status
from server.ray.replicas import ReplicaDied

DIED = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
STATUS_SECONDS = 10.0  # for all replicas to say how they are


class ServeReplicas:
    """The `Replicas` behind a handle of their deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)

    async def generate(self, call: Call) -> AsyncGenerator[Part, None]:
        """Run a request. See `Replicas.generate`."""
        parts = _on_its_own(self._generate, call)
        has_ended = False
        try:
            async for part in parts:
                yield cast(Part, part)
            has_ended = True
        except DIED as error:
            has_ended = True
            raise ReplicaDied(str(error)) from error
        finally:
            if not has_ended:
                parts.cancel()

    async def check(self, constraint: Constraint) -> CrmaError | None:
        """Check a constraint. See `Replicas.check`."""
        return cast("CrmaError | None", await self._one("check", constraint))

    async def model(self) -> ServedModel:
        """What a replica serves."""
        return cast(ServedModel, await self._one("model"))

    async def every(self, act: str, *arguments: Any) -> list[tuple[Status, CrmaError | None]]:
        """Call a method in all replicas. See `Replicas.every`."""
        timeout_s = STATUS_SECONDS if act == "status" else None
        try:
            answers = await self._handle.broadcast(act, *arguments).results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
                raise answer  # those that have died need not act
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _one(self, method: str, *arguments: Any) -> Any:
        try:
            return await _on_its_own(self._handle.options(method_name=method), *arguments)
        except DIED as error:
            raise ReplicaDied(str(error)) from error


def _on_its_own(handle: DeploymentHandle, *arguments: Any) -> Any:
    """Call a replica as nobody's part.

    Serve gives all calls of an HTTP request its id, and finds waiting calls by that: of several at
    once, all but the last would wait for ever.
    """
    return Context().run(handle.remote, *arguments)
