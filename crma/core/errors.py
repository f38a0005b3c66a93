"""The error tree of `crma`. Every error names the field, the value and what is allowed.

CrmaError
├── ConfigError          a setting or argument that cannot be honoured
├── UnsupportedModel     an architecture that cannot be injected or served; the message says why
├── DataError            a data set could not be had, or is not what its digest says
├── PullError            a base model could not be fetched, converted or verified
├── TrainingError        a run failed one of its own checks
└── StoreError           anything wrong with a store or an adapter in it
    ├── NotFound         no such task, backbone or version
    ├── DigestMismatch   a file is not what its manifest says
    ├── BaseMismatch     an adapter made for another base model
    ├── LineageMismatch  a LoRA under a backbone that is neither its own nor a descendant
    └── InvalidAdapter   wrong shape, unknown or missing tensor, pickle, path trick, unknown field

To add one: derive it here, add its line above, and (if a request can meet it) its status in `server/errors.py`.
"""


class CrmaError(Exception):
    """Base of the tree.

    Args:
        message: one sentence without blame that says what to do next where that is known.
        field: what the error is about, in the caller's words (a setting, a file, a request field).
        value: the offending value; shown to the caller, so never a secret.
        allowed: what would have been accepted.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        allowed: object = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = value
        self.allowed = allowed


class ConfigError(CrmaError, ValueError):
    """A setting or argument that cannot be honoured."""


class UnsupportedModel(CrmaError):
    """An architecture that cannot be injected or served."""


class DataError(CrmaError):
    """A data set could not be had, or is not what its digest says."""


class PullError(CrmaError):
    """A base model could not be fetched, converted or verified."""


class TrainingError(CrmaError):
    """A run failed one of its own checks."""


class StoreError(CrmaError):
    """Anything wrong with a store or an adapter in it."""


class NotFound(StoreError, LookupError):
    """No such task, backbone or version."""


class DigestMismatch(StoreError):
    """A file is not what its manifest says."""


class BaseMismatch(StoreError):
    """An adapter made for another base model."""


class LineageMismatch(StoreError):
    """A LoRA under a backbone that is neither its own nor a descendant."""


class InvalidAdapter(StoreError):
    """Wrong shape, unknown or missing tensor, pickle, path trick, unknown field."""
