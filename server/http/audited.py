"""The dependency of routes whose acts are audited."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Depends, Request

from server.http.auth import TheCaller
from server.http.dependencies import TheFrontend
from server.service.audit import Act
from server.service.errors import to_api_error


def audited(what: str) -> Any:
    """A dependency that gives the act to the route, which adds what it finds out.

    The act is in the audit log before the answer is sent. Requests without a key for the route
    are none.

    Args:
        what: the act, as a verb.
    """
    return Depends(_acting(what), scope="function")


def _acting(what: str) -> Callable[..., AsyncIterator[Act]]:
    async def acting(
        request: Request, frontend: TheFrontend, caller: TheCaller
    ) -> AsyncIterator[Act]:
        act = Act(caller.name, what, dict(request.path_params))
        try:
            yield act
        except Exception as error:
            act.result = to_api_error(error).code
            raise
        finally:
            await asyncio.to_thread(frontend.audit.write, act)

    return acting
