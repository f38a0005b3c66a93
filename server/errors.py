"""What a request can be refused with: the tree, the one table of statuses, and the handlers that write the answer.

Errors of `crma` and of the engine get their status from `STATUS_OF`. Anything else is a 500 that says nothing of the
inside; the log has it under the request id. Routes under /v1 answer in OpenAI's shape. To add one: derive it from
ApiError here.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from crma.errors import BaseMismatch, ConfigError, CrmaError, DigestMismatch, InvalidAdapter, LineageMismatch, NotFound
from server.engine.errors import AdapterPoolFull, EngineStopped, PromptTooLong, QueueFull
from server.schemas import EXAMPLES, ErrorBody

log = logging.getLogger("server")


class ApiError(CrmaError):
    """Base of the tree: a CrmaError with its status, code and the headers of its answer."""

    status = 500
    code = "internal_error"
    headers: Mapping[str, str] = {}

    def __init_subclass__(cls, status: int, code: str, headers: Mapping[str, str] = {}) -> None:
        cls.status, cls.code, cls.headers = status, code, headers


class MalformedBody(ApiError, status=400, code="malformed_body"):
    """Not UTF-8, or not JSON."""


class Unauthorized(ApiError, status=401, code="unauthorized", headers={"WWW-Authenticate": "Bearer"}):
    """No key, or not one of ours."""


class Forbidden(ApiError, status=403, code="forbidden"):
    """A good key that may not do this, or no admin key set."""


class NoRoute(ApiError, status=404, code="no_route"):
    """No such path."""


class MethodNotAllowed(ApiError, status=405, code="method_not_allowed"):
    """The path, but not by this method."""


class ModelNotFound(ApiError, status=404, code="model_not_found"):
    """No task or version for a `model` of OpenAI's routes."""


class NoBackbone(ApiError, status=409, code="no_backbone"):
    """CRMA asked for, none loaded."""


class AdapterBusy(ApiError, status=409, code="adapter_in_use"):
    """Requests use the adapter, or it is pinned."""


class AdapterUnloaded(ApiError, status=409, code="adapter_unloaded"):
    """An administrator took the request's adapter out of memory while it ran or waited."""


class BodyTooLarge(ApiError, status=413, code="body_too_large"):
    """Over `max_body_bytes`."""


class InvalidField(ApiError, status=422, code="invalid_field"):
    """A field that cannot be honoured."""


class UnknownField(ApiError, status=422, code="unknown_field"):
    """A field that there is not."""


class TooManyJobs(ApiError, status=429, code="too_many_jobs", headers={"Retry-After": "10"}):
    """As many background jobs run as may."""


class ClientGone(ApiError, status=499, code="client_gone"):
    """Nobody left to answer; only the log and metrics see it."""


class GenerationFailed(ApiError, status=500, code="generation_failed"):
    """The engine failed on this request."""


class NotReady(ApiError, status=503, code="not_ready", headers={"Retry-After": "1"}):
    """The store is not verified yet."""


class Draining(ApiError, status=503, code="draining"):
    """Stopping."""


class DeadlineExceeded(ApiError, status=504, code="deadline_exceeded"):
    """The request's deadline passed."""


# The first line whose type matches counts. Errors that no request can cause (PullError, …) have no line.
STATUS_OF: tuple[tuple[type[Exception], int, str], ...] = (
    (NotFound, 404, "not_found"),
    (BaseMismatch, 409, "base_mismatch"),
    (LineageMismatch, 409, "lineage_mismatch"),
    (DigestMismatch, 409, "digest_mismatch"),
    (InvalidAdapter, 409, "invalid_adapter"),
    (AdapterPoolFull, 409, "adapter_pool_full"),
    (ConfigError, 422, "invalid_field"),
    (PromptTooLong, 422, "prompt_too_long"),
    (QueueFull, 429, "queue_full"),
    (EngineStopped, 503, "draining"),
)


# Every (status, code) that there is.
_KINDS: list[type[ApiError]] = [ApiError, *ApiError.__subclasses__()]
CODES = sorted({(kind.status, kind.code) for kind in _KINDS} | {(status, code) for _, status, code in STATUS_OF})
GENERATING = (400, 401, 404, 409, 413, 422, 429, 500, 503, 504)


def documented(*statuses: int, body: type[BaseModel] = ErrorBody, of: str = "") -> dict[int | str, dict[str, Any]]:
    """The `responses` argument of a route that can answer with these: each with the codes that it can have.

    `of`: its path in EXAMPLES, to show what it answers.
    """
    named = {status: ", ".join(code for s, code in CODES if s == status) for status in statuses}
    answers: dict[int | str, dict[str, Any]] = {200: {"content": EXAMPLES[of]["answers"]}} if of else {}
    return answers | {status: {"model": body, "description": named[status]} for status in statuses}


def to_api_error(error: Exception) -> ApiError:
    """Any exception as the ApiError a client sees."""
    if isinstance(error, ApiError):
        return error
    found = next(((status, code) for kind, status, code in STATUS_OF if isinstance(error, kind)), None)
    if found is None or not isinstance(error, CrmaError):
        return ApiError("the server failed on this request; its log has the reason under this X-Request-Id")
    made = ApiError(error.message, field=error.field, value=error.value, allowed=error.allowed)
    made.status, made.code = found
    if isinstance(error, QueueFull):
        made.headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return made


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """An ErrorBody, for a path under /v1 an OpenAIErrorBody; safe to write as JSON whatever was sent."""
    limits = {"message": 500, "field": 200, "value": 200, "allowed": 4000}
    parts = {name: shown(getattr(error, name), limit) for name, limit in limits.items()}
    if not path.startswith("/v1/"):
        return {"error": {"code": error.code} | parts}
    message, allowed = parts["message"], parts["allowed"]
    if allowed is not None and str(allowed) not in message:  # OpenAI's shape has no place of its own for it
        message = f"{message} (allowed: {allowed})"
    param = "model" if parts["field"] == "task" else parts["field"]
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def shown(value: object, limit: int) -> Any:
    """`value` as JSON that can always be encoded and is not long: a client's NaN, lone surrogate or megabyte is cut."""
    if value is None or (isinstance(value, int | float) and abs(value) < 1e18):
        return value
    if isinstance(value, list | tuple | set):
        listed = [shown(item, limit) for item in list(value)[:100]]
        return listed if len(repr(listed)) <= limit else shown(repr(listed), limit)
    text = value if isinstance(value, str) else repr(value)
    return (text if len(text) <= limit else text[:limit] + "…").encode("utf-8", "backslashreplace").decode()


def error_response(error: ApiError, path: str) -> JSONResponse:
    """The answer for an error of a request to `path`."""
    return JSONResponse(error_body(error, path), status_code=error.status, headers=error.headers)


def _from_validation(error: RequestValidationError) -> ApiError:
    """The first problem of a body or path, with the field as the caller wrote it."""
    first: Mapping[str, Any] = error.errors()[0]
    kind, where, context, given = first["type"], first["loc"], first.get("ctx", {}), first.get("input")
    if kind == "json_invalid" or (where == ("body",) and (kind == "missing" or isinstance(given, bytes))):
        return _not_json()
    names = [str(part) for part in where[1:]]
    if kind == "unknown_field":
        field = ".".join([*names, context["key"]])
        value = given.get(context["key"]) if isinstance(given, dict) else None
        return UnknownField(f"unknown field {field!r}", field=field, value=value, allowed=context["allowed"])
    field = ".".join(names) or str(where[0])
    allowed = first["msg"].removeprefix("Value error, ")
    return InvalidField(f"{field}: {allowed}", field=field, value=given, allowed=allowed)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """What the framework itself refuses: an unknown route, a wrong method, a body it cannot read."""
    path, method, headers = request.url.path, request.method, error.headers or {}
    if error.status_code == 404:
        return NoRoute(f"no route {path}", field="path", value=path, allowed="see /docs")
    if error.status_code == 405:
        refusal = MethodNotAllowed(f"not by {method}", field="method", value=method, allowed=headers.get("Allow"))
        refusal.headers = headers
        return refusal
    if isinstance(error.__cause__, ClientDisconnect):
        return ClientGone("the client went away while it sent the body")
    return error.__cause__ if isinstance(error.__cause__, ApiError) else _not_json()


def _not_json() -> ApiError:
    return MalformedBody("the body is not JSON in UTF-8", field="body", allowed="a JSON object, as application/json")


def install(app: FastAPI) -> None:
    """One set of handlers for everything a route can raise."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            refusal = _from_validation(error)
        elif isinstance(error, HTTPException):
            refusal = _from_http(request, error)
        else:
            refusal = to_api_error(error)
            if refusal.status >= 500 and refusal is not error:
                log.error("%s: %s", type(error).__name__, error, exc_info=error)
        return error_response(refusal, request.scope["path"])

    for kind in (CrmaError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
