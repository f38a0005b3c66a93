"""The last word of a request that the end of the server cuts off."""

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.error_handlers import refuse
from server.service.errors import ServerStopped
from server.service.frontend import Frontend


@dataclass
class CutOff:
    """ASGI middleware: a request that is cancelled while the server stops is answered with 503.

    An answer that has begun cannot become one: its connection is closed.
    """

    app: ASGIApp
    frontend: Frontend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except asyncio.CancelledError:
            if scope["type"] != "http" or not self.frontend.draining:
                raise
            if not has_begun:
                error = ServerStopped("the server has stopped before the answer was there")
                await refuse(error, scope, receive, send)
