"""The rows of the acts of administrators. Every function is one transaction (`Database.run`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from server.records.tables import audit


@dataclass(frozen=True)
class Filter:
    """Which acts are wanted. None: whatever it is.

    Attributes:
        before: the id of an act; only earlier ones are wanted.
        who: the name of a key.
        what: an act, as a verb.
    """

    before: int | None = None
    who: str | None = None
    what: str | None = None


def add(connection: Connection, act: Mapping[str, Any]) -> None:
    """Add an act, given all its columns but the id."""
    connection.execute(insert(audit).values(act))


def newest(connection: Connection, wanted: Filter, limit: int) -> list[dict[str, Any]]:
    """The acts that are wanted, the newest first, each with all its columns."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if wanted.before is not None:
        query = query.where(audit.c.id < wanted.before)
    if wanted.who is not None:
        query = query.where(audit.c.who == wanted.who)
    if wanted.what is not None:
        query = query.where(audit.c.what == wanted.what)
    return [dict(row._mapping) for row in connection.execute(query)]


def remove_old(connection: Connection, before: str) -> None:
    """Remove the acts before a time: UTC, ISO 8601, with three digits after the second."""
    connection.execute(delete(audit).where(audit.c.time < before))
