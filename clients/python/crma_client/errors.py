"""The error tree of `crma_client`. Catch CrmaClientError to catch all of it.

CrmaClientError
├── InvalidArgument      an argument this client will not send (ValueError); nothing left the machine
├── ConnectionFailed     no connection, or it broke before the answer was complete
│   └── TimedOut         the client's own `timeout` ran out
├── ProtocolError        an answer that is not what the contract says
├── GenerationFailed     an `error` event after a stream had begun
└── StatusError          the server refused or failed; `status` is set
    ├── InvalidRequest       400, 413, 422   not JSON, body too large, unknown or invalid field, prompt over the context
    ├── NotAuthorized        401, 403        API key missing, unknown, or not allowed this
    ├── NotFound             404             unknown task, version or question set
    ├── Conflict             409             wrong base model, wrong CRMA lineage, or no backbone loaded
    ├── Overloaded           429             the queue is full; `retry_after` says when to try again
    ├── Unavailable          503             draining or not ready
    └── DeadlineExceeded     504             the request's deadline passed

A status without a class of its own is a plain StatusError. To add one: derive it here, add its line above and its
status to `_BY_STATUS`.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass(eq=False)
class CrmaClientError(Exception):
    """Base of the tree; whatever the server did not say is None.

    Args:
        message: one sentence for a person.
        status: HTTP status of the answer.
        code: the server's machine-readable name of the error.
        field: the request field it is about.
        value: the offending value.
        allowed: what would have been accepted.
        retry_after: seconds to wait before trying again.
    """

    message: str
    _: KW_ONLY
    status: int | None = None
    code: str | None = None
    field: str | None = None
    value: object = None
    allowed: object = None
    retry_after: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)


class InvalidArgument(CrmaClientError, ValueError):
    """An argument this client will not send; nothing left the machine."""


class ConnectionFailed(CrmaClientError):
    """No connection, or it broke before the answer was complete."""


class TimedOut(ConnectionFailed):
    """The client's own `timeout` ran out."""


class ProtocolError(CrmaClientError):
    """An answer that is not what the contract says."""


class GenerationFailed(CrmaClientError):
    """An `error` event after a stream had begun."""


class StatusError(CrmaClientError):
    """The server refused or failed."""


class InvalidRequest(StatusError):
    """400, 413, 422: not JSON, body too large, unknown or invalid field, prompt over the context."""


class NotAuthorized(StatusError):
    """401, 403: API key missing, unknown, or not allowed this."""


class NotFound(StatusError):
    """404: unknown task, version or question set."""


class Conflict(StatusError):
    """409: wrong base model, wrong CRMA lineage, or no backbone loaded."""


class Overloaded(StatusError):
    """429: the queue is full."""


class Unavailable(StatusError):
    """503: draining or not ready."""


class DeadlineExceeded(StatusError):
    """504: the request's deadline passed."""


_BY_STATUS: dict[int, type[StatusError]] = dict.fromkeys((400, 413, 422), InvalidRequest)
_BY_STATUS |= dict.fromkeys((401, 403), NotAuthorized)
_BY_STATUS |= {
    404: NotFound,
    409: Conflict,
    429: Overloaded,
    503: Unavailable,
    504: DeadlineExceeded,
}


def status_error(status: int, body: object, retry_after: str | None) -> StatusError:
    """The error for an answer of `status`; `body` is its JSON, or None where it had none (a proxy's page).

    `retry_after` is the header's text; its other form, a date, is left out.
    """
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
    details = _details(body, f"the server answered {status} without saying why")
    return _BY_STATUS.get(status, StatusError)(**details, status=status, retry_after=seconds)


def stream_error(body: object) -> GenerationFailed:
    """The error for the data of an `error` event."""
    return GenerationFailed(
        **_details(body, "the server ended the stream with an error without saying why")
    )


def _details(body: object, otherwise: str) -> dict[str, Any]:
    """What {"error": {…}} says, None for each thing it does not; `otherwise` is the message where it has none."""
    error = body.get("error") if isinstance(body, Mapping) else None
    found = error if isinstance(error, Mapping) else {}
    message = found.get("message") or otherwise
    return {
        "message": message,
        **{key: found.get(key) for key in ("code", "field", "value", "allowed")},
    }
