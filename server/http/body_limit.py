"""The limit of a request body."""

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.service.errors import BodyTooLarge


@dataclass
class BodyLimit:
    """ASGI middleware: stops reading a body that is over `max_bytes` or not UTF-8, and fails.

    uploads: limits of the paths whose POST takes files, in place of `max_bytes`; files may hold any
        bytes.
    texts: limits below these paths, of a PUT.
    """

    app: ASGIApp
    max_bytes: int
    uploads: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, int] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        max_bytes = self.max_bytes
        is_upload = scope.get("method") == "POST" and scope["path"] in self.uploads
        if is_upload:
            max_bytes = self.uploads[scope["path"]]
        for path, limit in self.texts.items():
            if scope.get("method") == "PUT" and scope["path"].startswith(path):
                max_bytes = limit

        async def checked_receive() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                part = message.get("body", b"")
                size += len(part)
                if size > max_bytes:
                    error = "the body is over the limit"
                    limit = f"<= {max_bytes} bytes"
                    raise BodyTooLarge(error, field="body", value=size, allowed=limit)
                if not is_upload:
                    decoder.decode(part, final=not message.get("more_body", False))
            return message

        await self.app(scope, checked_receive, send)
