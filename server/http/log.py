"""Logs to standard error: one line per answered request, text or JSON.

They never hold a prompt, an answer or a key. Nothing that a client sends can begin a line.
"""

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.access_fields import access_fields
from server.http.error_handlers import refuse
from server.service.errors import ClientGone, to_api_error
from server.service.metrics import Metrics

log = logging.getLogger("server")
access = logging.getLogger("server.access")

LOGGERS = {
    "server": logging.INFO,
    "crma": logging.INFO,
    "uvicorn": logging.INFO,
    "opentelemetry": logging.WARNING,
}
"""Whose records are shown, from which level on."""

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

UNKNOWN_ROUTE = "unknown"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestLog:
    """ASGI middleware, the outermost but for CORS.

    It gives every request an id, logs it and counts its answer.

    An `X-Request-Id` that was sent is kept if it is plain. An exception that no handler caught
    becomes a 500 that reveals no internals. The line has what `access_fields` finds in the
    request's state.
    """

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get("x-request-id", "")
        this_id = sent_id if _PLAIN_ID.fullmatch(sent_id) else uuid.uuid4().hex
        token = request_id.set(this_id)
        started = time.monotonic()
        status = 0
        scope.setdefault("state", {})

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = this_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("unexpected %s", type(error).__name__)
            answered = to_api_error(error)
            scope["state"]["error_code"] = answered.code
            if status:  # the answer has begun: the connection can only be cut
                raise
            await refuse(answered, scope, receive, send_with_id)
        finally:
            self._record(scope, status or ClientGone.status, time.monotonic() - started)
            request_id.reset(token)

    def _record(self, scope: Scope, status: int, wall_s: float) -> None:
        path = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
        state = scope["state"]
        self.metrics.http_responses.labels(route=path, status=str(status)).inc()
        if "error_code" in state:
            self.metrics.errors.labels(state["error_code"]).inc()
        fields = {
            "request_id": request_id.get(),
            "method": scope["method"],
            "path": path,
            "status": status,
            "wall_s": round(wall_s, 4),
            **access_fields(state),
        }
        access.info("answered", extra={"fields": fields})


class Format(logging.Formatter):
    """A record with its request's id and, for an answer, its fields: as text or as JSON."""

    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """One line. A traceback follows it in text, and is a field of it in JSON."""
        given: dict[str, Any] = {"request_id": request_id.get(), **getattr(record, "fields", {})}
        fields = {name: value for name, value in given.items() if value is not None}
        if self.form == "text":
            return self._text(record, fields)
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)

    def _text(self, record: logging.LogRecord, fields: dict[str, Any]) -> str:
        """The line, and a traceback indented below it: what an error says can hold line breaks."""
        parts = [self.formatTime(record), record.levelname, record.getMessage()]
        parts += [f"{name}={value}" for name, value in fields.items()]
        lines = [" ".join(parts)]
        if record.exc_info:
            lines += [f"  {line}" for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(map(_plain, lines))


def _plain(line: str) -> str:
    """A line of text whose control characters, line breaks among them, are escaped."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


def configure(form: Literal["text", "json"]) -> None:
    """Send the logs of `LOGGERS` to standard error in one form.

    uvicorn's own access log is off: `RequestLog` has its lines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Format(form))
    for name, level in LOGGERS.items():
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True
