"""Who may call a route: `Authorization: Bearer <key>`, and the scope that the route needs.

Without API keys, everyone may generate and ablate. Admin routes always need a key: where this
server has none for them they answer 403; no key or an unknown one is 401; a key without the scope
is 403. The admin key opens every route. Health and documentation need no key; neither do the
metrics, unless some tasks do not exist for some key. Every route has one of the `require_…` below,
or `audited`, which also asks for an administrator.
"""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from crma.access.scope import Scope
from server.http.dependencies import AfterResponse, TheFrontend
from server.service.caller import Caller
from server.service.errors import Forbidden, Unauthorized

_bearer = HTTPBearer(auto_error=False, description="An API key, or the admin key for admin routes.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def _caller(request: Request, frontend: TheFrontend, credentials: Credentials) -> Caller:
    """Who sends this request; also in `request.state.caller`, for the log."""
    key = None if credentials is None else credentials.credentials
    caller = frontend.keys.caller(key)
    request.state.caller = caller
    return caller


TheCaller = Annotated[Caller, Depends(_caller)]


class Open:
    """The dependency of routes that need no key."""

    async def __call__(self) -> None:
        """Check nothing."""


class Needs:
    """A dependency of routes: whoever calls them has one of these scopes."""

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = scopes

    async def __call__(self, frontend: TheFrontend, caller: TheCaller) -> None:
        """Check the caller.

        Raises:
            Forbidden: the key has none of the scopes, or no key of this server has.
            Unauthorized: no key, or an unknown one.
        """
        if not caller.scopes.isdisjoint(self.scopes):
            return
        if self.scopes == (Scope.ADMIN,) and not frontend.keys.has_admin:
            message = "admin routes are off: this server has no admin key"
            raise Forbidden(message, field="CRMA_ADMIN_KEY")
        needed = " or ".join(self.scopes)
        if not caller.name:
            message = f"this route needs a key for {needed}"
            raise Unauthorized(message, field="Authorization", allowed="Bearer <key>")
        held = sorted(caller.scopes)
        message = f"this route needs a key for {needed}, and this one is for {', '.join(held)}"
        raise Forbidden(message, field="Authorization", allowed=list(self.scopes))


class NeedsForNames(Needs):
    """The same for routes that show the names of all tasks; while every key has all, for nobody."""

    async def __call__(self, frontend: TheFrontend, caller: TheCaller) -> None:
        """Check the caller once some tasks do not exist for some key. Raises as `Needs`."""
        if frontend.keys.is_restricted:
            await super().__call__(frontend, caller)


class NeedsOwner(Needs):
    """The same for routes that keep what belongs to somebody: without keys nobody can be told
    apart, and only an admin may."""

    async def __call__(self, frontend: TheFrontend, caller: TheCaller) -> None:
        """Check the caller. Raises as `Needs`."""
        if frontend.keys.is_open:
            await Needs(Scope.ADMIN)(frontend, caller)
        await super().__call__(frontend, caller)


async def counted(frontend: TheFrontend, caller: TheCaller, after_response: AfterResponse) -> None:
    """A dependency of routes that compute: the request counts against the limits of its key until
    its answer is sent or its client is gone. Raises OverQuota.
    """
    frontend.quotas.enter(caller)
    after_response.callback(frontend.quotas.leave, caller)


needs_admin = Needs(Scope.ADMIN)
needs_ablate = Needs(Scope.ABLATE)
needs_owner = NeedsOwner(Scope.ABLATE, Scope.ADMIN)
require_generate = Depends(Needs(Scope.GENERATE))
require_ablate = Depends(needs_ablate)
require_admin = Depends(needs_admin)
require_key = Depends(Needs(Scope.GENERATE, Scope.ABLATE, Scope.ADMIN))
require_nothing = Depends(Open())
require_metrics = Depends(NeedsForNames(Scope.METRICS, Scope.ADMIN))
counts = Depends(counted)
