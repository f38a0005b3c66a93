"""The rows of what keys have used. Every function is one transaction (`Database.run`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sqlalchemy import BigInteger, Connection, Select, Table, cast, delete, func, select

from server.records.tables import usage, usage_writers

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

Column = Literal["day", "key", "task", "task_digest", "crma"]
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


class Use(NamedTuple):
    """Who used what, and when.

    Attributes:
        day: UTC, ISO 8601.
        key: its name; "": none was asked for.
        task: the name of the task adapter; "": the base model.
        task_digest: of the task adapter; "": the base model.
        crma: whether the backbone was on.
    """

    day: str
    key: str
    task: str
    task_digest: str
    crma: bool


class Amount(NamedTuple):
    """How much was used.

    Attributes:
        requests: prompts that ran.
        prompt_tokens: of these prompts, cached ones too.
        cached_tokens: those of them that the prefix cache had.
        output_tokens: of all answers.
    """

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    def plus(self, other: Amount) -> Amount:
        """The sum of two."""
        return Amount(*(one + more for one, more in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Filter:
    """Which rows are wanted. Days are inclusive; None: whatever it is.

    Attributes:
        seen_by: the name of a key that sees its own only.
        key: the name of a key.
        task: the name of a task adapter; "": the base model.
    """

    first_day: str
    last_day: str
    seen_by: str | None = None
    key: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Write:
    """One write of a server.

    Attributes:
        server: a name that no other process has.
        number: higher than that of its write before.
        day: on which it is; UTC, ISO 8601.
    """

    server: str
    number: int
    day: str


def add(connection: Connection, write: Write, amounts: Mapping[Use, Amount]) -> None:
    """Add amounts to what has been used before, unless this write has done so already.

    Rows are written in one order on every server: two that took them in different orders could
    wait for each other for ever.
    """
    writing = _insert(connection, usage_writers).values(
        server=write.server, num_writes=write.number, day=write.day
    )
    latest = writing.excluded
    once = writing.on_conflict_do_update(
        index_elements=["server"],
        set_={"num_writes": latest.num_writes, "day": latest.day},
        where=usage_writers.c.num_writes < latest.num_writes,
    )
    counted = {"preserve_rowcount": True}  # else SQLAlchemy does not ask the driver
    if not connection.execute(once, execution_options=counted).rowcount:
        return  # its commit got no answer
    added = _insert(connection, usage)
    sums = {name: usage.c[name] + added.excluded[name] for name in COUNTS}
    upsert = added.on_conflict_do_update(index_elements=list(Use._fields), set_=sums)
    rows = [{**use._asdict(), **amounts[use]._asdict()} for use in sorted(amounts)]
    connection.execute(upsert, rows)


def _insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An insert that knows what to do with a row that is there, which each dialect has as its own.

    That of PostgreSQL is imported where it is used: it takes 35 ms.
    """
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def totals(
    connection: Connection, wanted: Filter, by: Sequence[Column], limit: int
) -> list[dict[str, Any]]:
    """Sums of the rows that are wanted, at most `limit`, sorted.

    Args:
        by: there is one sum for each of their values; empty: a single one.
    """
    columns = [usage.c[name] for name in by]
    counts = [cast(func.sum(usage.c[name]), BigInteger).label(name) for name in COUNTS]
    query = _where(select(*columns, *counts), wanted).group_by(*columns).order_by(*columns)
    rows = connection.execute(query.limit(limit))
    return [dict(row._mapping) for row in rows if row.requests is not None]


def remove_old(connection: Connection, before: str) -> None:
    """Remove the days before a day, and the servers that have not written since."""
    connection.execute(delete(usage).where(usage.c.day < before))
    connection.execute(delete(usage_writers).where(usage_writers.c.day < before))


def _where(query: Select[Any], wanted: Filter) -> Select[Any]:
    query = query.where(usage.c.day >= wanted.first_day, usage.c.day <= wanted.last_day)
    for name in (wanted.seen_by, wanted.key):
        if name is not None:
            query = query.where(usage.c.key == name)
    if wanted.task is not None:
        query = query.where(usage.c.task == wanted.task)
    return query
