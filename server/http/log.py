"""Logs to standard error: one line per answered request, text or JSON. Never a prompt, an answer or a key."""

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


@dataclass
class RequestLog:
    """ASGI middleware, outermost: gives every request its id (an `X-Request-Id` that was sent is kept if it is plain),
    logs and counts its answer, and turns what nobody caught into a 500 that says nothing of the inside.

    A route puts what it resolved into `request.state.selection`; the task is logged by digest.
    """

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        this_id = sent if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", sent) else uuid.uuid4().hex
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
            if status:  # the answer has begun; the connection can only be cut
                raise
            await error_response(to_api_error(error), scope["path"])(scope, receive, send_with_id)
        finally:
            self._record(scope, status or 499, time.monotonic() - started)
            request_id.reset(token)

    def _record(self, scope: Scope, status: int, wall_s: float) -> None:
        path = getattr(scope.get("route"), "path", "unknown")
        self.metrics.http_responses.labels(route=path, status=str(status)).inc()
        fields = {
            "method": scope["method"],
            "path": path,
            "status": status,
            "wall_s": round(wall_s, 4),
        }
        if (selection := scope["state"].get("selection")) is not None:
            fields |= {"task": selection.task_digest, "crma": selection.crma_digest is not None}
        access.info("answered", extra={"fields": {"request_id": request_id.get(), **fields}})


class Format(logging.Formatter):
    """A record with its request's id and, for an answer, its fields: as text or as JSON."""

    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if there is one: in text under it, in JSON within it."""
        given: dict[str, Any] = {"request_id": request_id.get(), **getattr(record, "fields", {})}
        fields = {name: value for name, value in given.items() if value is not None}
        if self.form == "text":
            head, *rest = super().format(record).split("\n")
            return "\n".join(
                [" ".join([head, *(f"{name}={value}" for name, value in fields.items())]), *rest]
            )
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        line = {
            "time": stamp,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(form: Literal["text", "json"]) -> None:
    """Sends the `server`, `crma` and uvicorn logs to standard error in one form; uvicorn's own access log is off."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Format(form))
    for name in ("server", "crma", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
