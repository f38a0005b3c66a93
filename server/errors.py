"""What a request can be refused with: the tree, the one table of statuses, and the handlers that write the answer.

ApiError                   status, code
├── MalformedBody          400  not UTF-8, or not JSON
├── Unauthorized           401  no key, or not one of ours
├── Forbidden              403  a good key that may not do this, or no admin key set
├── NoBackbone             409  CRMA asked for, none loaded
├── BodyTooLarge           413  over `max_body_bytes`
├── InvalidField           422  unknown or invalid field
├── ClientGone             499  nobody left to answer; only the log and metrics see it
├── GenerationFailed       500  the engine failed on this request
├── NotReady               503  store not verified yet, or no step has run
├── Draining               503  stopping
└── DeadlineExceeded       504  the request's deadline passed

Errors of `crma` and of the engine get their status from `STATUS_OF`. Anything else is a 500 that says nothing of the
inside; the log has it under the request id. To add one: derive it here and add its line above.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from crma.errors import (
    AlreadyExists,
    BaseMismatch,
    ConfigError,
    CrmaError,
    DigestMismatch,
    InvalidAdapter,
    LineageMismatch,
    NotFound,
)
from server.engine.request import EngineError, EngineStopped, PromptTooLong, QueueFull

log = logging.getLogger("server")

MAX_SHOWN = 200


class ApiError(Exception):
    """Base of the tree. `field`, `value`, `allowed` as in CrmaError; `headers` go with the answer."""

    status = 500
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        allowed: object = None,
        status: int | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = value
        self.allowed = allowed
        self.status = status or self.status
        self.code = code or self.code
        self.headers = dict(headers or {})


class MalformedBody(ApiError):
    status, code = 400, "malformed_body"


class Unauthorized(ApiError):
    status, code = 401, "unauthorized"

    def __init__(self, message: str) -> None:
        super().__init__(message, field="Authorization", allowed="Bearer <key>", headers={"WWW-Authenticate": "Bearer"})


class Forbidden(ApiError):
    status, code = 403, "forbidden"


class NoBackbone(ApiError):
    status, code = 409, "no_backbone"


class BodyTooLarge(ApiError):
    status, code = 413, "body_too_large"


class InvalidField(ApiError):
    status, code = 422, "invalid_field"


class ClientGone(ApiError):
    status, code = 499, "client_gone"


class GenerationFailed(ApiError):
    status, code = 500, "generation_failed"


class NotReady(ApiError):
    status, code = 503, "not_ready"


class Draining(ApiError):
    status, code = 503, "draining"


class DeadlineExceeded(ApiError):
    status, code = 504, "deadline_exceeded"


# The first line whose type matches counts. Errors of the machine (PullError, TrainingError, …) are no request's fault.
STATUS_OF: tuple[tuple[type[Exception], int, str], ...] = (
    (NotFound, 404, "not_found"),
    (BaseMismatch, 409, "base_mismatch"),
    (LineageMismatch, 409, "lineage_mismatch"),
    (DigestMismatch, 409, "digest_mismatch"),
    (InvalidAdapter, 409, "invalid_adapter"),
    (AlreadyExists, 409, "already_exists"),
    (ConfigError, 422, "invalid_field"),
    (PromptTooLong, 422, "prompt_too_long"),
    (QueueFull, 429, "queue_full"),
    (EngineStopped, 503, "draining"),
)


def to_api_error(error: Exception) -> ApiError:
    """Any exception as the ApiError a client sees."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in STATUS_OF:
        if isinstance(error, kind):
            return ApiError(str(error), status=status, code=code, **_details(error))
    return ApiError("the server failed on this request; its log has the reason under this X-Request-Id")


def _details(error: Exception) -> dict[str, Any]:
    if isinstance(error, CrmaError):
        return {"field": error.field, "value": error.value, "allowed": error.allowed}
    if isinstance(error, PromptTooLong):
        limit = f"prompt tokens + max_tokens <= {error.max_model_len}"
        return {"field": "prompt", "value": error.num_prompt_tokens, "allowed": limit}
    if isinstance(error, QueueFull):
        return {"allowed": error.limit, "headers": {"Retry-After": str(max(1, math.ceil(error.retry_after)))}}
    return {}


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"error": {"code", "message", "field", "value", "allowed"}}`, safe to write as JSON whatever was sent."""
    return {
        "error": {
            "code": error.code,
            "message": _text(error.message, limit=500),
            "field": None if error.field is None else _text(error.field),
            "value": shown(error.value),
            "allowed": shown(error.allowed, limit=4000),
        }
    }


def shown(value: object, *, limit: int = MAX_SHOWN) -> Any:
    """`value` as JSON that can always be encoded and is not long: a client's NaN, lone surrogate or megabyte is cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) and abs(value) < 1e18 else _text(repr(value))
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        listed = [shown(item) for item in list(value)[:100]]
        return listed if len(repr(listed)) <= limit else _text(repr(listed), limit=limit)
    return _text(value if isinstance(value, str) else repr(value), limit=limit)


def _text(text: str, *, limit: int = MAX_SHOWN) -> str:
    cut = text if len(text) <= limit else text[:limit] + "…"
    return cut.encode("utf-8", "backslashreplace").decode()


def error_response(error: ApiError, path: str = "") -> JSONResponse:
    """The answer for an error; routes under `/v1` speak OpenAI's shape."""
    body = error_body(error)
    if path.startswith("/v1/"):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        inner = body["error"]
        body = {"error": {"message": inner["message"], "type": kind, "param": inner["field"], "code": inner["code"]}}
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def from_validation(error: RequestValidationError) -> ApiError:
    """The first problem of a body or path, with the field as the caller wrote it."""
    first: Mapping[str, Any] = error.errors()[0]
    kind, where, context = first["type"], first["loc"], first.get("ctx", {})
    given: Any = first.get("input")
    if kind == "json_invalid" or (where == ("body",) and (kind == "missing" or isinstance(given, bytes))):
        return MalformedBody("the body is not JSON", field="body", allowed="a JSON object, as application/json")
    # The branches of a union ("list[constrained-str]") are not fields of the caller's.
    names = [str(part) for part in where[1:] if not (isinstance(part, str) and "[" in part)]
    if kind == "unknown_field":
        field, value, allowed = ".".join([*names, context["key"]]), given.get(context["key"]), context["allowed"]
        return InvalidField(f"unknown field {field!r}", field=field, value=value, allowed=allowed, code=kind)
    field = ".".join(names) or str(where[0])
    reason = first["msg"].removeprefix("Value error, ")
    limits = [f"{sign} {context[key]}" for key, sign in _SIGNS.items() if key in context]
    return InvalidField(f"{field}: {reason}", field=field, value=given, allowed=" and ".join(limits) or None)


_SIGNS = {
    "ge": ">=",
    "gt": ">",
    "le": "<=",
    "lt": "<",
    "expected": "one of",
    "min_length": "length >=",
    "max_length": "length <=",
}


def install(app: FastAPI) -> None:
    """One set of handlers for everything a route can raise."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            shown_error = from_validation(error)
        elif isinstance(error, HTTPException):
            shown_error = _from_http(request, error)
        else:
            shown_error = to_api_error(error)
            if shown_error.status >= 500 and not isinstance(error, ApiError):
                log.error("%s: %s", type(error).__name__, error, exc_info=error)
        return error_response(shown_error, request.url.path)

    for kind in (ApiError, CrmaError, EngineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """What the framework itself refuses: an unknown route, a wrong method, a body it cannot parse."""
    path, method, headers = request.url.path, request.method, error.headers or {}
    if error.status_code == 404:
        return ApiError(f"no route {path}", status=404, code="no_route", field="path", value=path, allowed="see /docs")
    if error.status_code == 405:
        details = {"field": "method", "value": method, "allowed": headers.get("Allow")}
        return ApiError(f"not by {method}", status=405, code="method_not_allowed", headers=headers, **details)
    return MalformedBody("the body is not JSON", field="body", allowed="a JSON object, as application/json")
