"""A connection to a client, which may hold up neither the others nor the server.

uvicorn's protocol on httptools knows no limits: half a head, half a body or an answer that nobody
reads would keep its connection, and a descriptor of the process, for ever. Its other protocol, on
h11, limits the size of a head and nothing else, and is written in Python.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.http.error_handlers import error_body
from server.http.refusals import DISPLACED, Refusals
from server.service.errors import (
    ApiError,
    HeadTooLarge,
    MalformedRequest,
    RequestTimeout,
    TooManyConnections,
)

FIELD_BYTES = 32  # that a header counts beside its text, as in HTTP/2: each costs memory and time
LINGER_S = 2.0  # for a client that was refused to read it and close


@dataclass(frozen=True)
class ConnectionLimits:
    """What a client may take of a connection. Times are in seconds.

    Attributes:
        max_head_bytes: of a request's line and headers, and of the trailers of its body.
        head_timeout_s: from the first byte of a head to its last; for a new connection, from its
            beginning.
        stall_timeout_s: how long the client may leave an answer unread, and how long the rest of
            a body may take that is no longer needed.
    """

    max_head_bytes: int
    head_timeout_s: float
    stall_timeout_s: float


@dataclass(eq=False)
class Door:
    """The connections of one port.

    Attributes:
        max_connections: at most so many are open at once.
        refusals: is told of those that are refused.
        waiting: those whose client has to send something, the longest waiting first.
    """

    max_connections: int
    refusals: Refusals
    num_open: int = 0
    waiting: dict["Connection", None] = field(default_factory=dict)

    def admit(self) -> bool:
        """Count one more connection, if there is room.

        Where there is none, the one that has waited longest for its client is closed for it.
        """
        if self.num_open >= self.max_connections:
            oldest = next(iter(self.waiting), None)
            if oldest is None:
                return False
            oldest.make_room()
        self.num_open += 1
        return True


class Connection(HttpToolsProtocol):
    """uvicorn's protocol within `ConnectionLimits`. uvicorn makes one for each connection.

    A body that is needed has its limits in `server/http/body_limit.py`, which can answer as every
    other error is answered.

    Args:
        limits: of this connection.
        doors: by port.
    """

    def __init__(
        self, *args: Any, limits: ConnectionLimits, doors: Mapping[int, Door], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._doors = doors
        self._door: Door | None = None  # None: not admitted, or closed
        self._reads_head = False
        self._reads_body = False
        self._head_bytes = 0
        self._refusal: ApiError | None = None
        self._is_refused = False
        self._late: asyncio.TimerHandle | None = None  # when the client has to have sent it
        self._unread: asyncio.TimerHandle | None = None  # when it has to have read

    # The connection ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection, or refuse it at once."""
        super().connection_made(transport)
        assert self.server is not None
        door = self._doors[self.server[1] or 0]
        self._refusals = door.refusals
        if not door.admit():
            message = "the server has no connection left; try again"
            allowed = f"<= {door.max_connections} at once"
            self._refuse(TooManyConnections(message, field="connection", allowed=allowed))
            return
        self._door = door
        self._wait()
        self._expect(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.leave()
        self._expect(None)
        self._trust_to_read()
        super().connection_lost(exc)

    def leave(self) -> None:
        """Make room for another connection."""
        if self._door is not None:
            self._door.waiting.pop(self, None)
            self._door.num_open -= 1
            self._door = None

    def make_room(self) -> None:
        """Close at once, for another connection."""
        if not self._is_refused:
            self._refusals.add(DISPLACED, self.client)
        self.leave()
        self.transport.abort()

    def _wait(self) -> None:
        """From now on, something has to come from the client."""
        if self._door is not None:
            self._door.waiting.setdefault(self)

    # What the client sends ---------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read on; refuse a head that grows too large."""
        if self._door is None or self._is_refused:
            return
        in_head = self._reads_head
        super().data_received(data)
        if self.transport.is_closing() or self._is_refused:
            return
        if in_head and self._reads_head:
            self._head_bytes += len(data)  # httptools keeps a header until it is complete
            if self._head_bytes > self._limits.max_head_bytes:
                self._refuse(self._head_too_large())
        self._expect_head_if_idle()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._reads_head = self._reads_body = True
        self._head_bytes = 0
        self._expect(self._limits.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        self._count(FIELD_BYTES + len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request begins; its body may follow."""
        self._reads_head = False
        self._expect(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The whole request has come."""
        self._reads_body = False
        self._expect(None)
        if self._door is not None and self._is_answering:
            self._door.waiting.pop(self, None)
        super().on_message_complete()

    def _count(self, num_bytes: int) -> None:
        """Raises ValueError for a head over the limit: uvicorn then calls `send_400_response`."""
        self._head_bytes += num_bytes
        if self._head_bytes > self._limits.max_head_bytes:
            self._refusal = self._head_too_large()
            raise ValueError(self._refusal.message)

    def _head_too_large(self) -> ApiError:
        limit = self._limits.max_head_bytes
        message = f"headers: over {limit} bytes"
        allowed = f"<= {limit} bytes, {FIELD_BYTES} of them for each header"
        return HeadTooLarge(message, field="headers", value=self._head_bytes, allowed=allowed)

    # Answers -----------------------------------------------------------------------------------

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        """The next request may come; the rest of a body that nobody needs has little time."""
        super().on_response_complete()
        self._wait()
        if self.transport.is_closing():
            self._abort_unless_read()
        elif self._reads_body:
            self._expect(self._limits.stall_timeout_s)

    def pause_writing(self) -> None:
        """The client does not read as fast as the server writes."""
        super().pause_writing()
        self._abort_unless_read()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._trust_to_read()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._abort_unless_read()

    def send_400_response(self, msg: str) -> None:
        """The refusal of what is no HTTP, or of a head over the limit."""
        self._refuse(self._refusal or MalformedRequest(msg, field="request", allowed="HTTP/1.1"))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and close; while another answer is being sent, only close."""
        self._refusals.add(error.code, self.client)
        if not self._is_answering:
            body = json.dumps(error_body(error, path="/")).encode()
            head = [
                STATUS_LINE[error.status],
                b"content-type: application/json\r\n",
                b"content-length: %d\r\n" % len(body),
                b"connection: close\r\n",
            ]
            for name, value in error.headers.items():
                head.append(f"{name.lower()}: {value}\r\n".encode())
            self.transport.write(b"".join([*head, b"\r\n", body]))
        if self._door is None or self._is_answering:
            self.transport.close()
            self._abort_unless_read()
        else:
            self._close_when_client_does()

    def _close_when_client_does(self) -> None:
        """Say that no more comes, and pass over what the client sends until it closes.

        If the server closed while a byte of the client was on its way, the system would answer with
        a reset, and the client could lose what it has not read yet.
        """
        self._is_refused = True
        self._expect(None)
        self._wait()
        self.transport.write_eof()
        self._abort_unless_read(LINGER_S)

    # Time --------------------------------------------------------------------------------------

    def _expect(self, seconds: float | None) -> None:
        """Give the client so long for what it has to send now; None: it has to send nothing."""
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if seconds is not None:
            self._late = self.loop.call_later(seconds, self._is_late, seconds)

    def _expect_head_if_idle(self) -> None:
        """After bytes that begin no request: uvicorn has just ended its keep-alive time-out."""
        is_idle = not self._reads_body and not self._is_answering
        if is_idle and self._late is None and self.timeout_keep_alive_task is None:
            self._expect(self._limits.head_timeout_s)

    def _is_late(self, seconds: float) -> None:
        """The client has not sent in time what it had to, unless it was the server's fault."""
        if self.flow.read_paused or (self._reads_head and self._is_answering):
            self._expect(seconds)
            return
        if self._reads_head:
            message = f"the headers took longer than {seconds:g} s"
            allowed = f"<= {seconds:g} s"
            self._refuse(RequestTimeout(message, field="headers", allowed=allowed))
            return
        self.transport.close()
        self._abort_unless_read()

    def _abort_unless_read(self, most_s: float = math.inf) -> None:
        """Closing waits until the client has read what was written: not for ever."""
        if self._unread is None:
            timeout_s = min(self._limits.stall_timeout_s, most_s)
            self._unread = self.loop.call_later(timeout_s, self.transport.abort)

    def _trust_to_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
