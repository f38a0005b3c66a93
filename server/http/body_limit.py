"""The limit of a request body."""

import codecs
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.service.errors import BodyTooLarge


@dataclass
class BodyLimit:
    """ASGI middleware: stops reading a body that is over `max_bytes` or not UTF-8, and fails."""

    app: ASGIApp
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        decoder = codecs.getincrementaldecoder("utf-8")()

        async def checked_receive() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                part = message.get("body", b"")
                size += len(part)
                if size > self.max_bytes:
                    error = "the body is over the limit"
                    limit = f"<= {self.max_bytes} bytes"
                    raise BodyTooLarge(error, field="body", value=size, allowed=limit)
                decoder.decode(part, final=not message.get("more_body", False))
            return message

        await self.app(scope, checked_receive, send)
