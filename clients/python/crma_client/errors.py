"""The errors that `crma_client` raises. Catch CrmaClientError to catch all of them.

CrmaClientError
├── InvalidArgument      the client cannot send this argument (also a ValueError); nothing was sent
├── ConnectionFailed     no connection, or it broke before the answer was complete
│   └── TimedOut         the client's own `timeout` expired
├── ProtocolError        the answer does not follow the server's documented format
├── GenerationFailed     the server sent an `error` event after a stream had begun
├── JobFailed            a background job ended without a report; `value` is its id
└── StatusError          the server refused the request or failed; `status` is set
    ├── InvalidRequest       400, 413, 422   not JSON, body too large, or a field is invalid
    ├── NotAuthorized        401, 403        API key missing, unknown or without permission
    ├── NotFound             404             unknown task, version, question set or job
    ├── Conflict             409             wrong base model or CRMA lineage, or no backbone
    ├── Overloaded           429             the queue is full; see `retry_after`
    ├── Unavailable          503             the server is starting, stopping or has stopped
    └── DeadlineExceeded     504             the request's deadline passed

Any other status raises a plain StatusError. To add a class, derive it below, add its line to the
tree above and its status to `_BY_STATUS`.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass(eq=False)
class CrmaClientError(Exception):
    """Base class of all errors of this package.

    Args:
        message: one sentence for a person to read.
        status: HTTP status of the answer.
        code: the server's machine-readable name for the error.
        field: the request field that caused it.
        value: the value that was refused.
        allowed: the values that would have been accepted.
        retry_after: seconds to wait before another attempt.

    Every attribute but `message` is None unless the server (or this client) gave it.
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

    def __str__(self) -> str:
        """The message and, unless it says that already, what is allowed."""
        if self.allowed is None or str(self.allowed) in self.message:
            return self.message
        return f"{self.message} (allowed: {self.allowed})"


class InvalidArgument(CrmaClientError, ValueError):
    """The client cannot send this argument; nothing was sent."""


class ConnectionFailed(CrmaClientError):
    """There was no connection, or it broke before the answer was complete."""


class TimedOut(ConnectionFailed):
    """The client's own `timeout` expired."""


class ProtocolError(CrmaClientError):
    """The answer does not follow the server's documented format."""


class GenerationFailed(CrmaClientError):
    """The server sent an `error` event after a stream had begun."""


class JobFailed(CrmaClientError):
    """A background job failed, or was cancelled; `value` is its id."""


class StatusError(CrmaClientError):
    """The server refused the request or failed."""


class InvalidRequest(StatusError):
    """400, 413, 422: not JSON, body too large, a field unknown or invalid, or prompt too long."""


class NotAuthorized(StatusError):
    """401, 403: API key missing, unknown or without permission."""


class NotFound(StatusError):
    """404: unknown task, version, question set or job."""


class Conflict(StatusError):
    """409: wrong base model or CRMA lineage, or no backbone is loaded."""


class Overloaded(StatusError):
    """429: the queue is full; wait `retry_after` seconds before another attempt."""


class Unavailable(StatusError):
    """503: the server is starting or stopping; `server_stopped` is the code of what had begun."""


class DeadlineExceeded(StatusError):
    """504: the request's deadline passed."""


_BY_STATUS: dict[int, type[StatusError]] = {
    400: InvalidRequest,
    401: NotAuthorized,
    403: NotAuthorized,
    404: NotFound,
    409: Conflict,
    413: InvalidRequest,
    422: InvalidRequest,
    429: Overloaded,
    503: Unavailable,
    504: DeadlineExceeded,
}


def status_error(status: int, body: object, retry_after: str | None) -> StatusError:
    """Build the error for an answer with an HTTP status of failure.

    Args:
        status: the HTTP status.
        body: the JSON of the answer; None if it is not JSON, such as a proxy's error page.
        retry_after: the Retry-After header. Only its form in seconds is read, not a date.

    Returns:
        The error, of the class that belongs to `status`.
    """
    details = _details(body, default_message=f"the server answered {status} without a message")
    seconds = None
    if retry_after is not None and retry_after.isdecimal():
        seconds = float(retry_after)
    error_class = _BY_STATUS.get(status, StatusError)
    return error_class(**details, status=status, retry_after=seconds)


def stream_error(body: object) -> GenerationFailed:
    """Build the error for an `error` event whose data is the JSON `body`."""
    default_message = "the server ended the stream with an error without a message"
    return GenerationFailed(**_details(body, default_message))


def _details(body: object, default_message: str) -> dict[str, Any]:
    """The fields of `{"error": {...}}`; each that is absent is None, or the default message."""
    error = body.get("error") if isinstance(body, Mapping) else None
    given = error if isinstance(error, Mapping) else {}
    details = {key: given.get(key) for key in ("code", "field", "value", "allowed")}
    if details["field"] is None:
        details["field"] = given.get("param")  # as OpenAI's routes call it
    message = given.get("message")
    details["message"] = message if message and isinstance(message, str) else default_message
    return details
