"""API keys: `Authorization: Bearer <key>`, compared in constant time. Health, metrics and documentation stay open.

No `api_keys` set: everyone may generate. Admin routes need the admin key whatever `api_keys` says: none set 403;
no key or an unknown one 401; a good API key that is not the admin key 403. The admin key opens everything.
"""

import hmac
from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from server.http.dependencies import TheFrontend
from server.service.errors import Forbidden, Unauthorized

_bearer = HTTPBearer(auto_error=False, description="An API key, or the admin key for admin routes.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _is_one_of(
    given: HTTPAuthorizationCredentials | None, keys: Iterable[SecretStr | None]
) -> bool:
    """Compares with every key, so that the time tells nothing of which one was near."""
    if given is None:
        return False
    sent = given.credentials.encode()
    return (
        sum(hmac.compare_digest(sent, key.get_secret_value().encode()) for key in keys if key) > 0
    )


def require_key(frontend: TheFrontend, credentials: Credentials) -> None:
    """Raises Unauthorized where API keys are set and the request has none of them."""
    settings = frontend.settings
    if settings.api_keys and not _is_one_of(credentials, (*settings.api_keys, settings.admin_key)):
        raise Unauthorized(
            "an API key that this server knows is needed",
            field="Authorization",
            allowed="Bearer <key>",
        )


def require_admin(frontend: TheFrontend, credentials: Credentials) -> None:
    """Raises Forbidden where no admin key is set or an ordinary key was given, Unauthorized for any other key."""
    settings = frontend.settings
    if settings.admin_key is None:
        raise Forbidden(
            "admin routes are off: this server has no admin key", field="CRMA_ADMIN_KEY"
        )
    if _is_one_of(credentials, (settings.admin_key,)):
        return
    if _is_one_of(credentials, settings.api_keys):
        raise Forbidden(
            "this route needs the admin key, and this is an ordinary API key", field="Authorization"
        )
    raise Unauthorized("the admin key is needed", field="Authorization", allowed="Bearer <key>")
