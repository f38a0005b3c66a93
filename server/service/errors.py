"""The errors that an answer can carry, and the one table of their statuses and codes.

Errors of `crma` and of the engine get their status from `STATUS_OF`. Any other exception is a 500
that reveals no internals. To add an error: derive it from ApiError here.
"""

from collections.abc import Mapping

from crma.core.errors import (
    BaseMismatch,
    ConfigError,
    CrmaError,
    DigestMismatch,
    InvalidAdapter,
    LineageMismatch,
    NotFound,
    NotSigned,
    ReadOnlyStore,
)
from server.engine.errors import (
    AdapterPoolFull,
    ConstraintStuck,
    EngineStopped,
    InvalidConstraint,
    PromptTooLong,
    QueueFull,
    UnsupportedRequest,
)
from server.records.errors import RecordsNotWritable, RecordsUnavailable


class ApiError(CrmaError):
    """Base of the tree: a CrmaError with its status, code and the headers of its answer."""

    status = 500
    code = "internal_error"
    headers: Mapping[str, str] = {}

    def __init_subclass__(cls, status: int, code: str, headers: Mapping[str, str] = {}) -> None:
        cls.status = status
        cls.code = code
        cls.headers = headers


class MalformedBody(ApiError, status=400, code="malformed_body"):
    """Not UTF-8, not JSON, or nested too deep."""


class MalformedRequest(ApiError, status=400, code="malformed_request"):
    """Not HTTP."""


class RequestTooLarge(ApiError, status=400, code="request_too_large"):
    """More sequences than the server ever has room for: waiting does not help."""


class Unauthorized(
    ApiError, status=401, code="unauthorized", headers={"WWW-Authenticate": "Bearer"}
):
    """No key, or an unknown one."""


class Forbidden(ApiError, status=403, code="forbidden"):
    """A known key without this right, or a server without an admin key."""


class NoRoute(ApiError, status=404, code="no_route"):
    """No such path."""


class MethodNotAllowed(ApiError, status=405, code="method_not_allowed"):
    """The path exists, but not with this method."""


class ModelNotFound(ApiError, status=404, code="model_not_found"):
    """No task or version for a `model` of OpenAI's routes."""


class RequestTimeout(ApiError, status=408, code="request_timeout", headers={"Connection": "close"}):
    """Headers or a body that did not come in time."""


class NoBackbone(ApiError, status=409, code="no_backbone"):
    """CRMA was asked for and no backbone is loaded."""


class AdapterBusy(ApiError, status=409, code="adapter_in_use"):
    """Requests use the adapter, or it is pinned."""


class AdapterExists(ApiError, status=409, code="adapter_exists"):
    """A task of this name serves, and the request does not say to replace it."""


class AdapterServes(ApiError, status=409, code="adapter_serves"):
    """A version that serves cannot be deleted."""


class PromotionRuns(ApiError, status=409, code="promotion_runs"):
    """One promotion runs at a time."""


class TooManyQuestionSets(ApiError, status=409, code="too_many_question_sets"):
    """As many uploaded question sets of one key are kept as may be."""


class AdapterUnloaded(ApiError, status=409, code="adapter_unloaded"):
    """An administrator unloaded the request's adapter while it ran or waited."""


class BodyTooLarge(ApiError, status=413, code="body_too_large"):
    """A body over `max_body_bytes`."""


class WrongHost(ApiError, status=421, code="wrong_host"):
    """A server without keys was called by a name that is not its own."""


class InvalidField(ApiError, status=422, code="invalid_field"):
    """A field that cannot be honoured."""


class UnknownField(ApiError, status=422, code="unknown_field"):
    """A field that does not exist."""


class TooManyJobs(ApiError, status=429, code="too_many_jobs", headers={"Retry-After": "10"}):
    """As many background jobs of one key wait as may."""


class OverQuota(ApiError, status=429, code="rate_limit_exceeded"):
    """The key has used what it may; Retry-After says when it may use more."""


class HeadTooLarge(ApiError, status=431, code="head_too_large"):
    """Headers over `max_head_bytes`."""


class ClientGone(ApiError, status=499, code="client_gone"):
    """The client disconnected; only the log and the metrics show it."""


class GenerationFailed(ApiError, status=500, code="generation_failed"):
    """The engine failed on this request."""


class NotReady(ApiError, status=503, code="not_ready", headers={"Retry-After": "1"}):
    """The store is not verified yet."""


class Loading(ApiError, status=503, code="loading", headers={"Retry-After": "1"}):
    """The server has just been started, and its model is being loaded."""


class Draining(ApiError, status=503, code="draining", headers={"Retry-After": "1"}):
    """The server is stopping and has not begun with the request; another may answer."""


class ServerStopped(ApiError, status=503, code="server_stopped"):
    """The server stopped before a request was done that had begun: it may have run in part."""


class ReplicaLost(ApiError, status=503, code="replica_lost", headers={"Retry-After": "1"}):
    """What ran the request has ended, and an answer had begun or no other could run it."""


class TooManyConnections(
    ApiError, status=503, code="too_many_connections", headers={"Retry-After": "1"}
):
    """`max_connections` are open, and all of them are being answered."""


class DeadlineExceeded(ApiError, status=504, code="deadline_exceeded"):
    """The request's deadline passed."""


class StoreBusy(ApiError, status=503, code="store_busy", headers={"Retry-After": "10"}):
    """The store's file system does not answer, or another change of the store takes long."""


class StoreNotWritable(ApiError, status=507, code="store_not_writable"):
    """The store's folder is read-only, or its disk is full."""


# The first line whose type matches counts. Errors that no request can cause, such as PullError,
# have no line.
STATUS_OF: tuple[tuple[type[Exception], int, str], ...] = (
    (NotFound, 404, "not_found"),
    (BaseMismatch, 409, "base_mismatch"),
    (LineageMismatch, 409, "lineage_mismatch"),
    (DigestMismatch, 409, "digest_mismatch"),
    (NotSigned, 409, "not_signed"),
    (ReadOnlyStore, 409, "read_only_store"),
    (InvalidAdapter, 409, "invalid_adapter"),
    (AdapterPoolFull, 409, "adapter_pool_full"),
    (ConfigError, 422, "invalid_field"),
    (InvalidConstraint, 400, "invalid_constraint"),
    (ConstraintStuck, 400, "constraint_stuck"),
    (UnsupportedRequest, 400, "unsupported_request"),
    (PromptTooLong, 400, "context_length_exceeded"),
    (QueueFull, 429, "queue_full"),
    (EngineStopped, 503, "draining"),
    (RecordsUnavailable, 503, "records_unavailable"),
    (RecordsNotWritable, 507, "records_not_writable"),
)


STOPPING = (Draining, EngineStopped, ServerStopped)
"""What is raised because the server stops, before a request has begun or in its midst."""

_KINDS: list[type[ApiError]] = [ApiError, *ApiError.__subclasses__()]
_OWN = {(kind.status, kind.code) for kind in _KINDS}
_TRANSLATED = {(status, code) for _, status, code in STATUS_OF}
CODES = sorted(_OWN | _TRANSLATED)
"""Every (status, code) that an answer can carry."""


def to_api_error(error: Exception) -> ApiError:
    """Any exception as the ApiError a client sees."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in STATUS_OF:
        if isinstance(error, kind) and isinstance(error, CrmaError):
            return _translated(error, status, code)
    message = "the server failed on this request; its log has the reason under this X-Request-Id"
    return ApiError(message)


def _translated(error: CrmaError, status: int, code: str) -> ApiError:
    """The error of another room with its status and code."""
    made = ApiError(error.message, field=error.field, value=error.value, allowed=error.allowed)
    made.status = status
    made.code = code
    if isinstance(error, QueueFull):
        made.headers = {"Retry-After": str(error.seconds)}
    if isinstance(error, EngineStopped):
        made.headers = Draining.headers
    if isinstance(error, RecordsUnavailable):
        made.headers = {"Retry-After": "5"}
    return made
