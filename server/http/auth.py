"""API keys: `Authorization: Bearer <key>`, compared in constant time.

Without `api_keys`, everyone may generate. Admin routes always need the admin key: without one set
they answer 403; no key or an unknown one is 401; an ordinary API key is 403. The admin key opens
every route. Health, metrics and documentation need no key.
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


def require_key(frontend: TheFrontend, credentials: Credentials) -> None:
    """Raises Unauthorized where API keys are set and the request has none of them."""
    settings = frontend.settings
    if not settings.api_keys:
        return
    if not _is_one_of(credentials, (*settings.api_keys, settings.admin_key)):
        message = "a valid API key is required"
        raise Unauthorized(message, field="Authorization", allowed="Bearer <key>")


def require_admin(frontend: TheFrontend, credentials: Credentials) -> None:
    """Check for the admin key.

    Raises:
        Forbidden: this server has no admin key, or the request has an ordinary API key.
        Unauthorized: no key, or an unknown one.
    """
    settings = frontend.settings
    if settings.admin_key is None:
        message = "admin routes are off: this server has no admin key"
        raise Forbidden(message, field="CRMA_ADMIN_KEY")
    if _is_one_of(credentials, (settings.admin_key,)):
        return
    if _is_one_of(credentials, settings.api_keys):
        message = "this route needs the admin key, and this is an ordinary API key"
        raise Forbidden(message, field="Authorization")
    raise Unauthorized("the admin key is needed", field="Authorization", allowed="Bearer <key>")


def _is_one_of(
    given: HTTPAuthorizationCredentials | None, keys: Iterable[SecretStr | None]
) -> bool:
    """Compares with every key, so that the time taken does not tell which one was close."""
    if given is None:
        return False
    sent = given.credentials.encode()
    is_known = False
    for key in keys:
        if key is not None and hmac.compare_digest(sent, key.get_secret_value().encode()):
            is_known = True
    return is_known
