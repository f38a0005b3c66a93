"""The error tree of `crma`. Every error names the field, its value and the allowed values.

CrmaError
├── ConfigError          a setting or an argument is not valid
├── UnsupportedModel     an architecture cannot be injected or served; the message says why
├── DataError            a data set cannot be obtained, or does not match its digest
├── PullError            a base model cannot be fetched, converted or verified
├── TrainingError        a training run failed one of its own checks
├── ServerError          a server that a command talks to cannot be reached, or failed
└── StoreError           a store, or an adapter in it, is not usable
    ├── NotFound         no such task, backbone or version
    ├── DigestMismatch   a file is not the one its manifest describes
    ├── BaseMismatch     an adapter was made for another base model
    ├── LineageMismatch  a LoRA meets a backbone other than its own or one of its descendants
    ├── VersionServes    a version that serves cannot be removed
    ├── ReadOnlyStore    a copy of a store on another machine is not changed here
    ├── SourceUnavailable  a store on another machine cannot be read now
    ├── NotSigned        a version has no signature of the required key
    └── InvalidAdapter   wrong shape, unknown or missing tensor, pickle, unsafe path, unknown field

To add an error, derive it here and add its line above. If a request can cause it, also give it an
HTTP status in `server/service/errors.py`.
"""

import copyreg
from typing import Any


class CrmaError(Exception):
    """The base class of every error in the tree.

    Args:
        message: one sentence that says what is wrong and, where known, what to do about it.
        field: the setting, file or request field at fault, by the name that the caller knows.
        value: the offending value. The caller sees it, so it must never be a secret.
        allowed: the values that would have been accepted.
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error cross to another process, whatever the arguments of its class are."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigError(CrmaError, ValueError):
    """A setting or an argument is not valid."""


class UnsupportedModel(CrmaError):
    """An architecture cannot be injected or served."""


class DataError(CrmaError):
    """A data set cannot be obtained, or does not match its digest."""


class PullError(CrmaError):
    """A base model cannot be fetched, converted or verified."""


class TrainingError(CrmaError):
    """A training run failed one of its own checks."""


class ServerError(CrmaError):
    """A server that a command talks to cannot be reached, or failed."""


class StoreError(CrmaError):
    """A store, or an adapter in it, is not usable."""


class NotFound(StoreError, LookupError):
    """There is no such task, backbone or version."""


class DigestMismatch(StoreError):
    """A file is not the one its manifest describes."""


class BaseMismatch(StoreError):
    """An adapter was made for another base model."""


class LineageMismatch(StoreError):
    """A LoRA meets a backbone that is neither its own nor a descendant of its own."""


class VersionServes(StoreError):
    """A version that serves cannot be removed."""


class ReadOnlyStore(StoreError):
    """A copy of a store on another machine is not changed here."""


class SourceUnavailable(StoreError):
    """A store on another machine cannot be read now."""


class NotSigned(StoreError):
    """A version has no signature, or one of another key or of other files."""


class InvalidAdapter(StoreError):
    """A wrong shape, an unknown or missing tensor, a pickle, an unsafe path or an unknown field."""
