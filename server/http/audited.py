"""The dependency of routes whose acts are audited."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Depends, Request

from crma.access.scope import Scope
from server.http.auth import Needs, TheCaller, needs_admin
from server.http.dependencies import TheFrontend
from server.http.error_handlers import as_api_error
from server.http.log import request_id
from server.service.audit import Act
from server.service.generation import ABORTED


def audited(what: str, needs: Needs = needs_admin) -> Any:
    """A dependency that gives the act to the route, which adds what it finds out.

    It also checks the caller: what another key tries is an act that is refused. Requests without a
    key are none, so that nobody can fill the records without one. The act is written before the
    answer is sent.

    Args:
        what: the act, as a verb.
        needs: checks the caller.
    """
    return Depends(_acting(what, needs), scope="function")


def _acting(what: str, needs: Needs) -> Callable[..., AsyncIterator[Act]]:
    async def acting(
        request: Request, frontend: TheFrontend, caller: TheCaller
    ) -> AsyncIterator[Act]:
        about = dict(request.path_params)
        act = Act(caller.name, what, about, tenant=caller.tenant, request_id=request_id.get())
        try:
            await needs(frontend, caller)
            yield act
        except Exception as error:
            answered = as_api_error(request, error)
            act.result, act.reason = answered.code, answered.message
            raise
        except BaseException:  # the server stops: how far the act came is not known
            act.result = ABORTED
            raise
        finally:
            if Scope.ADMIN in caller.scopes:
                await frontend.audit.write(act)
            elif caller.name:
                await frontend.audit.write_limited(act)

    return acting
