"""Which names a server without keys may be called by: against DNS rebinding.

A page in a browser can make a name of its own lead to this machine, and then read all answers as
those of its own origin. It sends that name as the Host. Addresses are always allowed, because no
name can be made to look like one.
"""

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.error_handlers import refuse
from server.service.errors import WrongHost

ALL = "*"
LOOPBACK = "localhost"


@dataclass
class HostCheck:
    """ASGI middleware: refuses requests whose Host is neither an address nor one of `names`.

    A request without a Host is no browser's.
    """

    app: ASGIApp
    names: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if not given or self._is_allowed(given):
            await self.app(scope, receive, send)
            return
        names = sorted({LOOPBACK, *self.names})
        message = "this server has no keys, so it answers under its own names only; name others in"
        refusal = WrongHost(
            f"{message} CRMA_ALLOWED_HOSTS", field="Host", value=given, allowed=names
        )
        await refuse(refusal, scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        if ALL in self.names:
            return True
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        name = (name or "").rstrip(".")
        return name == LOOPBACK or name in self.names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
