"""API keys: `Authorization: Bearer <key>`, compared in constant time. Health, metrics and documentation stay open.

No `api_keys` set: everyone may generate. Admin routes need the admin key whatever `api_keys` says: none set 403;
no key or an unknown one 401; a good API key that is not the admin key 403. The admin key opens everything.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from server.errors import Forbidden, Unauthorized
from server.settings import Settings

_bearer = HTTPBearer(auto_error=False, description="An API key, or the admin key for admin routes.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _is_one_of(given: str, keys: Iterable[SecretStr]) -> bool:
    """Compares with every key, so that the time tells nothing of which one was near."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(given.encode(), key.get_secret_value().encode())
    return found


def require_key(request: Request, credentials: Credentials) -> None:
    """Raises Unauthorized where API keys are set and the request has none of them."""
    settings: Settings = request.app.state.settings
    if not settings.api_keys:
        return
    if credentials is None:
        raise Unauthorized("this server needs an API key")
    admin = (settings.admin_key,) if settings.admin_key else ()
    if not _is_one_of(credentials.credentials, (*settings.api_keys, *admin)):
        raise Unauthorized("the API key is not known here")


def require_admin(request: Request, credentials: Credentials) -> None:
    """Raises Forbidden where no admin key is set or an ordinary key was given, Unauthorized for any other key."""
    settings: Settings = request.app.state.settings
    if settings.admin_key is None:
        raise Forbidden("admin routes are off: this server has no admin key", field="CRMA_ADMIN_KEY")
    if credentials is None:
        raise Unauthorized("this route needs the admin key")
    if _is_one_of(credentials.credentials, (settings.admin_key,)):
        return
    if _is_one_of(credentials.credentials, settings.api_keys):
        raise Forbidden("this route needs the admin key, and this is an ordinary API key")
    raise Unauthorized("the admin key is not known here")
