"""How an error is answered: one set of handlers for everything that a route can raise.

Routes under /v1 answer in OpenAI's shape. What nobody expected is a 500 that says nothing of the
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

from crma.core.errors import CrmaError
from server.http.schemas import EXAMPLES, ErrorBody
from server.service.errors import (
    CODES,
    ApiError,
    ClientGone,
    InvalidField,
    MalformedBody,
    MethodNotAllowed,
    NoRoute,
    UnknownField,
    to_api_error,
)

log = logging.getLogger("server")

GENERATING = (400, 401, 404, 409, 413, 422, 429, 500, 503, 504)


def documented(
    *statuses: int, body: type[BaseModel] = ErrorBody, of: str = ""
) -> dict[int | str, dict[str, Any]]:
    """The `responses` argument of a route that can answer with these: each with the codes that it can have.

    `of`: its path in EXAMPLES, to show what it answers.
    """
    named = {status: ", ".join(code for s, code in CODES if s == status) for status in statuses}
    answers: dict[int | str, dict[str, Any]] = (
        {200: {"content": EXAMPLES[of]["answers"]}} if of else {}
    )
    return answers | {status: {"model": body, "description": named[status]} for status in statuses}


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """An ErrorBody, for a path under /v1 an OpenAIErrorBody; safe to write as JSON whatever was sent."""
    limits = {"message": 500, "field": 200, "value": 200, "allowed": 4000}
    parts = {name: shown(getattr(error, name), limit) for name, limit in limits.items()}
    if not path.startswith("/v1/"):
        return {"error": {"code": error.code} | parts}
    message, allowed = parts["message"], parts["allowed"]
    if (
        allowed is not None and str(allowed) not in message
    ):  # OpenAI's shape has no place of its own for it
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
    return (
        (text if len(text) <= limit else text[:limit] + "…")
        .encode("utf-8", "backslashreplace")
        .decode()
    )


def error_response(error: ApiError, path: str) -> JSONResponse:
    """The answer for an error of a request to `path`."""
    return JSONResponse(error_body(error, path), status_code=error.status, headers=error.headers)


def _from_validation(error: RequestValidationError) -> ApiError:
    """The first problem of a body or path, with the field as the caller wrote it."""
    first: Mapping[str, Any] = error.errors()[0]
    kind, where, context, given = (
        first["type"],
        first["loc"],
        first.get("ctx", {}),
        first.get("input"),
    )
    if kind == "json_invalid" or (
        where == ("body",) and (kind == "missing" or isinstance(given, bytes))
    ):
        return _not_json()
    names = [str(part) for part in where[1:]]
    if kind == "unknown_field":
        field = ".".join([*names, context["key"]])
        value = given.get(context["key"]) if isinstance(given, dict) else None
        return UnknownField(
            f"unknown field {field!r}", field=field, value=value, allowed=context["allowed"]
        )
    field = ".".join(names) or str(where[0])
    allowed = first["msg"].removeprefix("Value error, ")
    return InvalidField(f"{field}: {allowed}", field=field, value=given, allowed=allowed)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """What the framework itself refuses: an unknown route, a wrong method, a body it cannot read."""
    path, method, headers = request.url.path, request.method, error.headers or {}
    if error.status_code == 404:
        return NoRoute(f"no route {path}", field="path", value=path, allowed="see /docs")
    if error.status_code == 405:
        refusal = MethodNotAllowed(
            f"not by {method}", field="method", value=method, allowed=headers.get("Allow")
        )
        refusal.headers = headers
        return refusal
    if isinstance(error.__cause__, ClientDisconnect):
        return ClientGone("the client went away while it sent the body")
    return error.__cause__ if isinstance(error.__cause__, ApiError) else _not_json()


def _not_json() -> ApiError:
    return MalformedBody(
        "the body is not JSON in UTF-8", field="body", allowed="a JSON object, as application/json"
    )


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
