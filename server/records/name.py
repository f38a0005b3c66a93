"""Names that clients send, compared with those in a column."""

from sqlalchemy import Column, ColumnElement, false

_NUL = "\0"


def has_name(column: Column[str], name: str) -> ColumnElement[bool]:
    """Whether a column has this name. No name has a NUL, and PostgreSQL refuses to look for one."""
    return false() if _NUL in name else column == name
