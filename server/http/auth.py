"""Who may call a route: `Authorization: Bearer <key>`, and the scope that the route needs.

Without API keys, everyone may generate and ablate. Admin routes always need a key: where this
server has none for them they answer 403; no key or an unknown one is 401; a key without the scope
is 403. The admin key opens every route. Health, metrics and documentation need no key.
"""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from crma.access.scope import Scope
from server.http.dependencies import TheFrontend
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


require_generate = Needs(Scope.GENERATE)
require_ablate = Needs(Scope.ABLATE)
require_admin = Needs(Scope.ADMIN)
require_key = Needs(*Scope)
