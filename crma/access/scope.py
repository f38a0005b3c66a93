"""What a key may be for."""

from enum import StrEnum


class Scope(StrEnum):
    """A group of routes that a key opens.

    Attributes:
        GENERATE: those that generate and encode.
        ABLATE: ablations and question sets.
        METRICS: the metrics, with the names of all tasks, once they are closed.
        ADMIN: what changes adapters and question sets.
    """

    GENERATE = "generate"
    ABLATE = "ablate"
    METRICS = "metrics"
    ADMIN = "admin"
