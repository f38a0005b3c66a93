"""Why a record cannot be read or written."""

from crma.core.errors import CrmaError


class RecordsError(CrmaError):
    """Base of both."""


class RecordsNotWritable(RecordsError):
    """The disk is full, or the database may not be written. Waiting alone does not help."""


class RecordsUnavailable(RecordsError):
    """The database does not answer, or is another release's. It may answer later."""
