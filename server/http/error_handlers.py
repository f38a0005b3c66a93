"""How an error is answered: one set of handlers for everything that a route can raise.

Routes under /v1 answer in OpenAI's shape. An unexpected exception is a 500 that says nothing of the
inside; the log has it under the request id.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from crma.core.errors import CrmaError
from server.http.body import EXAMPLES
from server.http.schemas import ErrorBody
from server.service.errors import (
    CODES,
    ApiError,
    ClientGone,
    InvalidField,
    MalformedBody,
    MethodNotAllowed,
    NoRoute,
    StoreNotWritable,
    UnknownField,
    to_api_error,
)

log = logging.getLogger("server")

GENERATING = (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504)
"""Statuses of the routes that generate, beside 200."""

MAX_SHOWN = {"message": 500, "field": 200, "value": 200, "allowed": 4000}
"""Characters of each part of an error that an answer shows."""

PROMPT_FIELDS = {"/v1/chat/completions": "messages", "/v1/responses": "input"}
"""Where a route of OpenAI's has its prompt."""

TOO_LONG = "context_length_exceeded"

Responses = dict[int | str, dict[str, Any]]


def documented(
    *statuses: int, body: type[BaseModel] = ErrorBody, example_of: str = ""
) -> Responses:
    """The `responses` argument of a route: each status with the codes that it can have.

    Args:
        statuses: the errors that the route can answer with.
        body: the shape of these errors.
        example_of: a path in EXAMPLES, whose answers are shown for status 200.
    """
    responses: Responses = {}
    if example_of:
        responses[200] = {"content": EXAMPLES[example_of]["answers"]}
    for status in statuses:
        codes = [code for known, code in CODES if known == status]
        responses[status] = {"model": body, "description": ", ".join(codes)}
    return responses


def install(app: FastAPI) -> None:
    """Add the handlers to an app."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return error_response(answered(request, error), request.scope["path"])

    for kind in (CrmaError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def answered(request: Request, error: Exception) -> ApiError:
    """What a client sees of an exception. The access log and the metrics have its code.

    What the server is to blame for is logged: in a line, or with a traceback if nobody foresaw it.
    """
    found = as_api_error(request, error)
    request.state.error_code = found.code
    is_disk = found.status == StoreNotWritable.status
    if found.status >= 500 and (found is not error or is_disk):
        is_unforeseen = found.code == ApiError.code
        log.error("%s: %s", type(error).__name__, error, exc_info=error if is_unforeseen else None)
    return found


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with an error, outside of the app's own handlers."""
    scope.setdefault("state", {})["error_code"] = error.code
    await error_response(error, scope["path"])(scope, receive, send)


def error_response(error: ApiError, path: str) -> JSONResponse:
    """The answer for an error of a request to `path`."""
    body = error_body(error, path)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """An ErrorBody, or an OpenAIErrorBody for a path under /v1.

    It can always be written as JSON.
    """
    parts = {name: shown(getattr(error, name), limit) for name, limit in MAX_SHOWN.items()}
    if path.startswith("/v1/"):
        return {"error": _openai_error(error, parts, path)}
    return {"error": {"code": error.code, **parts}}


def shown(value: object, limit: int) -> Any:
    """A short form of `value` that JSON can hold, whatever a client sent: NaN, half a surrogate
    pair or a megabyte of text."""
    if value is None or (isinstance(value, int | float) and abs(value) < 1e18):
        return value
    if isinstance(value, list | tuple | set):
        listed = [shown(item, limit) for item in list(value)[:100]]
        return listed if len(repr(listed)) <= limit else shown(repr(listed), limit)
    text = value if isinstance(value, str) else repr(value)
    if len(text) > limit:
        text = text[:limit] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def _openai_error(error: ApiError, parts: Mapping[str, Any], path: str) -> dict[str, Any]:
    message = parts["message"]
    allowed = parts["allowed"]
    if allowed is not None and str(allowed) not in message:  # OpenAI's shape has no field for it
        message = f"{message} (allowed: {allowed})"
    return {
        "message": message,
        "type": "invalid_request_error" if error.status < 500 else "server_error",
        "param": _openai_field(error, parts["field"], path),
        "code": error.code,
    }


def _openai_field(error: ApiError, field: str | None, path: str) -> str | None:
    """The name that a field has in OpenAI's request, if it is another."""
    if field == "task":
        return "model"
    # Of other errors, `prompt` is the field of that name that was sent.
    is_prompt = field == "messages" or (field == "prompt" and error.code == TOO_LONG)
    return PROMPT_FIELDS.get(path, field) if is_prompt else field


def as_api_error(request: Request, error: Exception) -> ApiError:
    """What a client sees of an exception."""
    if isinstance(error, RequestValidationError):
        return _from_validation(request, error)
    if isinstance(error, HTTPException):
        return _from_http(request, error)
    return to_api_error(error)


def _from_validation(request: Request, error: RequestValidationError) -> ApiError:
    """The first problem of a body, query or path, with the field as the caller wrote it."""
    first: Mapping[str, Any] = error.errors()[0]
    kind = first["type"]
    location = first["loc"]
    given = first.get("input")
    is_whole_body = location == ("body",)
    if kind == "json_invalid" or (
        is_whole_body and (kind == "missing" or isinstance(given, bytes))
    ):
        return _not_json(request)
    names = [str(part) for part in location[1:]]
    if kind == "unknown_field":
        key = first["ctx"]["key"]
        field = ".".join([*names, key])
        value = given.get(key) if isinstance(given, dict) else None
        message = f"unknown field {field!r}"
        return UnknownField(message, field=field, value=value, allowed=first["ctx"]["allowed"])
    if kind == "broken_text":
        names += first["ctx"]["place"]
        given = first["ctx"]["text"]
    field = ".".join(names) or str(location[0])
    allowed = first["msg"].removeprefix("Value error, ")
    return InvalidField(f"{field}: {allowed}", field=field, value=given, allowed=allowed)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """A refusal of the framework: an unknown route, a wrong method, a body it cannot read."""
    path = request.url.path
    headers = error.headers or {}
    if error.status_code == 404:
        return NoRoute(f"no route {path}", field="path", value=path, allowed="see /docs")
    if error.status_code == 405:
        method = request.method
        message = f"this route does not take {method}"
        allowed = headers.get("Allow")
        refusal = MethodNotAllowed(message, field="method", value=method, allowed=allowed)
        refusal.headers = headers
        return refusal
    cause = error.__cause__
    if isinstance(cause, ClientDisconnect):
        return ClientGone("the client went away while it sent the body")
    return cause if isinstance(cause, ApiError) else _not_utf8()


def _not_json(request: Request) -> ApiError:
    """The error for a body that is not JSON, or that its header does not say is JSON.

    Pages of other origins can send a body without asking only if it is not said to be JSON. `curl
    -d` sets another header unless told not to.
    """
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        sent = f"as {kind}" if kind else "without a type"
        message = f"the body was sent {sent}: set the header Content-Type: application/json"
        allowed = "application/json"
        return MalformedBody(message, field="Content-Type", value=given, allowed=allowed)
    return _not_utf8()


def _not_utf8() -> ApiError:
    message = "the body is not JSON in UTF-8"
    return MalformedBody(message, field="body", allowed="a JSON object, as application/json")
