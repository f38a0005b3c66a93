"""Logs to standard error: one line per answered request, text or JSON. Never a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response, to_api_error
from server.metrics import Metrics

log = logging.getLogger("server")
access = logging.getLogger("server.access")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

FIELDS = ("request_id", "method", "path", "status", "wall_s", "task", "crma")


class RequestLog:
    """ASGI middleware, outermost: gives every request its id (an `X-Request-Id` that was sent is kept if it is plain),
    logs and counts its answer, and turns what nobody caught into a 500 that says nothing of the inside.

    A route puts what it resolved into `request.state.selection`; the task is logged by digest.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

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
        route = scope.get("route")
        path = getattr(route, "path", None) or "unknown"
        self.metrics.http_responses.labels(route=path, status=str(status)).inc()
        selection = scope["state"].get("selection")
        extra: dict[str, Any] = {
            "request_id": request_id.get(),
            "method": scope["method"],
            "path": path,
            "status": status,
            "wall_s": round(wall_s, 4),
        }
        if selection is not None:
            extra |= {"task": selection.task_digest, "crma": selection.crma_digest is not None}
        access.info("%s %s %d", scope["method"], path, status, extra=extra)


class _Format(logging.Formatter):
    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        fields.setdefault("request_id", request_id.get())
        if self.form == "json":
            stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
            line = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage(), **fields}
            if record.exc_info:
                line["traceback"] = self.formatException(record.exc_info)
            return json.dumps(line)
        shown = " ".join(
            f"{name}={value}"
            for name, value in fields.items()
            if value is not None and name not in ("method", "path", "status")
        )
        head, _, rest = super().format(record).partition("\n")
        return f"{head} {shown}".rstrip() + (f"\n{rest}" if rest else "")


def configure(form: Literal["text", "json"]) -> None:
    """Sends the `server`, `crma` and uvicorn logs to standard error in one form; uvicorn's own access log is off."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format(form))
    for name in ("server", "crma", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
