"""A port on which nothing but health and metrics answers."""

from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.error_handlers import refuse
from server.service.errors import NoRoute


@dataclass
class HealthPort:
    """ASGI middleware: on `port` there are no routes but `paths`."""

    app: ASGIApp
    port: int
    paths: Collection[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["server"][1] == self.port:
            path = scope["path"]
            if path not in self.paths:
                allowed = sorted(self.paths)
                message = f"no route {path} on the port for health"
                error = NoRoute(message, field="path", value=path, allowed=allowed)
                await refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)
