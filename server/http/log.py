"""Logs to standard error: one line per answered request, text or JSON.

They never hold a prompt, an answer or a key.
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

from server.http.error_handlers import error_response
from server.service.errors import to_api_error
from server.service.metrics import Metrics

log = logging.getLogger("server")
access = logging.getLogger("server.access")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestLog:
    """ASGI middleware, the outermost but for CORS.

    It gives every request an id, logs it and counts its answer.

    An `X-Request-Id` that was sent is kept if it is plain. An exception that no handler caught
    becomes a 500 that reveals no internals. A route puts the adapters that it resolved into
    `request.state.selection`; the log has the task by digest.
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
            if status:  # the answer has begun: the connection can only be cut
                raise
            response = error_response(to_api_error(error), scope["path"])
            await response(scope, receive, send_with_id)
        finally:
            self._record(scope, status or 499, time.monotonic() - started)
            request_id.reset(token)

    def _record(self, scope: Scope, status: int, wall_s: float) -> None:
        path = getattr(scope.get("route"), "path", "unknown")
        self.metrics.http_responses.labels(route=path, status=str(status)).inc()
        fields = {
            "request_id": request_id.get(),
            "method": scope["method"],
            "path": path,
            "status": status,
            "wall_s": round(wall_s, 4),
        }
        selection = scope["state"].get("selection")
        if selection is not None:
            fields["task"] = selection.task_digest
            fields["crma"] = selection.crma_digest is not None
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
        first, *traceback = super().format(record).split("\n")
        pairs = [f"{name}={value}" for name, value in fields.items()]
        return "\n".join([" ".join([first, *pairs]), *traceback])


def configure(form: Literal["text", "json"]) -> None:
    """Send the `server`, `crma` and uvicorn logs to standard error in one form.

    uvicorn's own access log is off: `RequestLog` has its lines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Format(form))
    for name in ("server", "crma", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
