"""The limits of a request body: its size, its time and, of JSON, its depth."""

import asyncio
import codecs
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.json_shape import shape_of
from server.service.errors import BodyTooLarge, MalformedBody, RequestTimeout

LEAST_RATE = 4096  # bytes a second of a body that may take longer than the time limit
MAX_DEPTH = 512  # objects and lists in one another
LARGE = 65_536  # bytes; a body of 1 MiB takes 10 ms to be read and checked
MAX_SIZE = 100_000  # objects and lists; the largest question set has 30,000


@dataclass
class BodyLimit:
    """ASGI middleware: stops reading a body that is over a limit or not UTF-8, and fails.

    Args:
        max_bytes: the largest body.
        timeout_s: how long a body may take to come, beside a second for each LEAST_RATE bytes.
        uploads: limits of the paths whose POST takes files, in place of `max_bytes`; files may hold
            any bytes.
        texts: limits below these paths, of a PUT.
    """

    app: ASGIApp
    max_bytes: int
    timeout_s: float
    uploads: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, int] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the app's own start and end, which come when they come
            await self.app(scope, receive, send)
            return
        is_upload = scope.get("method") == "POST" and scope["path"] in self.uploads
        body = _Upload(self.uploads[scope["path"]]) if is_upload else self._text(scope)
        started: float | None = None

        async def checked_receive() -> Message:
            nonlocal started
            if body.is_whole:
                return await receive()
            if started is None:
                started = time.monotonic()
            allowed_s = self.timeout_s + body.size / LEAST_RATE
            try:
                async with asyncio.timeout(started + allowed_s - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise _too_slow(body.size, allowed_s) from error
            if message["type"] == "http.request":
                body.take(message.get("body", b""), is_last=not message.get("more_body", False))
                await self._others_first(body.size)
            return message

        await self.app(scope, checked_receive, send)

    async def _others_first(self, size: int) -> None:
        """Let the event loop do what waits: what follows, reading `size` bytes, takes long again.

        Large bodies go on one by one, part by part. Else all that came since the loop last looked
        at its sockets would be read before it looks again.
        """
        if size > LARGE:
            async with self._turn:
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(0)

    def _text(self, scope: Scope) -> "_Text":
        """What the body has to be: JSON, or, below some paths, lines that their route checks."""
        for path, max_bytes in self.texts.items():
            if scope.get("method") == "PUT" and scope["path"].startswith(path):
                return _Text(max_bytes)
        return _Json(self.max_bytes)


class _Upload:
    """A body of any bytes, as it comes.

    Attributes:
        size: bytes so far.
        is_whole: nothing follows.
    """

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self.is_whole = False
        self._max_bytes = max_bytes

    def take(self, part: bytes, *, is_last: bool) -> None:
        """Take the next part. Raises BodyTooLarge."""
        self.size += len(part)
        self.is_whole = is_last
        if self.size > self._max_bytes:
            limit = f"<= {self._max_bytes} bytes"
            message = "the body is over the limit"
            raise BodyTooLarge(message, field="body", value=self.size, allowed=limit)


class _Text(_Upload):
    """A body of text."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def take(self, part: bytes, *, is_last: bool) -> None:
        """Take the next part.

        Raises:
            BodyTooLarge: over the limit.
            UnicodeDecodeError: not UTF-8.
        """
        super().take(part, is_last=is_last)
        self._decoder.decode(part, final=is_last)


class _Json(_Text):
    """A body of JSON."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._parts: list[bytes] = []

    def take(self, part: bytes, *, is_last: bool) -> None:
        """Take the next part.

        Raises:
            BodyTooLarge, UnicodeDecodeError: as for any text.
            MalformedBody: nested deeper than MAX_DEPTH, or with more than MAX_SIZE objects and
                lists.
        """
        super().take(part, is_last=is_last)
        self._parts.append(part)
        if is_last:
            _check_shape(b"".join(self._parts))


def _check_shape(text: bytes) -> None:
    """Raises MalformedBody."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    depth, size = shape_of(text)
    if depth > MAX_DEPTH:
        message = f"body: nested deeper than {MAX_DEPTH} levels"
        allowed = f"<= {MAX_DEPTH} objects and lists in one another"
        raise MalformedBody(message, field="body", value=depth, allowed=allowed)
    if size > MAX_SIZE:
        message = f"body: more than {MAX_SIZE} objects and lists"
        raise MalformedBody(message, field="body", value=size, allowed=f"<= {MAX_SIZE}")


def _too_slow(size: int, allowed_s: float) -> RequestTimeout:
    message = f"the body took longer than {allowed_s:.3g} s; {size} bytes have come"
    allowed = f"<= {allowed_s:.3g} s"
    return RequestTimeout(message, field="body", value=size, allowed=allowed)
