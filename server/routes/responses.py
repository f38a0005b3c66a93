"""How the documentation shows errors."""

from __future__ import annotations

from typing import Any

from server.schemas import ErrorBody

MEANINGS = {
    400: "Not UTF-8, or not JSON.",
    401: "No key, or an unknown one.",
    403: "Not an admin key, or none is set.",
    404: "Unknown task, version or question set; `allowed` lists what there is.",
    409: "Wrong base model or CRMA lineage, no backbone loaded, or an adapter in use or not sound.",
    413: "Body over the limit.",
    422: "Unknown or invalid field, or a prompt over the context.",
    429: "The queue is full; `Retry-After` says for how long.",
    500: "The server failed; its log has the reason under `X-Request-Id`.",
    503: "Not ready, or stopping.",
    504: "The request's deadline passed.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` argument of a route that can answer with these."""
    return {status: {"model": ErrorBody, "description": MEANINGS[status]} for status in statuses}
