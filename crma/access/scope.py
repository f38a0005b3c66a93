"""What a key may be for."""

from enum import StrEnum


class Scope(StrEnum):
    """A group of routes that a key opens."""

    GENERATE = "generate"
    ABLATE = "ablate"
    ADMIN = "admin"
