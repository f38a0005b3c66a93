"""The rows of uploaded question sets. Every function is one transaction (`Database.run`).

A set arrives in pieces under an id of its own and is nobody's until it is complete. Then it takes
the place of the owner's set of that name, in one transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from server.records.clock import now_s
from server.records.name import has_name
from server.records.tables import question_sets, questions

EVERYONE = ""  # the owner of sets that everyone may ask


@dataclass(frozen=True)
class StoredSet:
    """A complete question set, without its questions."""

    id: str
    owner: str
    name: str
    digest: str
    num_items: int


_COLUMNS = [question_sets.c[name] for name in StoredSet.__dataclass_fields__]


def begin(connection: Connection, id: str, owner: str, name: str, lease_s: float) -> None:
    """A set begins to arrive. It may be removed unless more comes within `lease_s` seconds."""
    values = {
        "id": id,
        "owner": owner,
        "name": name,
        "digest": "",
        "num_items": 0,
        "is_complete": False,
        "arriving_until": now_s() + lease_s,
    }
    connection.execute(insert(question_sets).values(values))


def add_questions(
    connection: Connection, id: str, first: int, items: Sequence[Any], lease_s: float
) -> None:
    """Add the questions of a set that arrives.

    Args:
        id: the set's.
        first: the position of the first of them.
        items: parsed JSON.
        lease_s: as in `begin`, from now on.
    """
    rows = [
        {"question_set": id, "position": first + index, "question": item}
        for index, item in enumerate(items)
    ]
    connection.execute(insert(questions), rows)
    arriving = update(question_sets).where(question_sets.c.id == id)
    connection.execute(arriving.values(arriving_until=now_s() + lease_s))


def complete(connection: Connection, id: str, digest: str, num_items: int) -> None:
    """Show a set, in place of the owner's earlier one of that name. The id must exist."""
    is_new = question_sets.c.id == id
    query = select(question_sets.c.owner, question_sets.c.name).where(is_new)
    owner, name = connection.execute(query).one()
    is_earlier = (question_sets.c.owner == owner) & (question_sets.c.name == name)
    earlier = is_earlier & question_sets.c.is_complete
    connection.execute(delete(question_sets).where(earlier))
    values = {"digest": digest, "num_items": num_items, "is_complete": True, "arriving_until": None}
    connection.execute(update(question_sets).where(is_new).values(values))


def remove(connection: Connection, id: str) -> None:
    """Remove a set with its questions, if it is there."""
    connection.execute(delete(question_sets).where(question_sets.c.id == id))


def remove_abandoned(connection: Connection) -> None:
    """Remove what arrived of sets whose senders have gone."""
    has_gone = question_sets.c.arriving_until < now_s()
    connection.execute(delete(question_sets).where(~question_sets.c.is_complete, has_gone))


def num_others(connection: Connection, owner: str, name: str) -> int:
    """How many sets of an owner are there, or arrive, beside the one of this name that is there."""
    is_it = question_sets.c.is_complete & (question_sets.c.name == name)
    query = select(func.count()).where(question_sets.c.owner == owner, ~is_it)
    return connection.execute(query).scalar_one()


def remove_named(connection: Connection, owner: str, name: str) -> bool:
    """Remove an owner's set of this name. False: there is none."""
    is_named = (question_sets.c.owner == owner) & (question_sets.c.name == name)
    removed = delete(question_sets).where(is_named, question_sets.c.is_complete)
    return connection.execute(removed).rowcount > 0


def visible(connection: Connection, owner: str) -> list[StoredSet]:
    """The sets that an owner may ask, by name; their own hide those of everyone."""
    own_last = question_sets.c.owner  # "" sorts before any other
    query = select(*_COLUMNS).where(_may_ask(owner)).order_by(question_sets.c.name, own_last)
    by_name = {row.name: StoredSet(**row._mapping) for row in connection.execute(query)}
    return list(by_name.values())


def find(connection: Connection, name: str, owner: str) -> tuple[StoredSet, list[Any]] | None:
    """A set that an owner may ask, with its questions as parsed JSON; None if there is none."""
    query = select(*_COLUMNS).where(_may_ask(owner), has_name(question_sets.c.name, name))
    own_first = query.order_by(question_sets.c.owner.desc()).limit(1)
    row = connection.execute(own_first).one_or_none()
    if row is None:
        return None
    content = select(questions.c.question).where(questions.c.question_set == row.id)
    ordered = connection.execute(content.order_by(questions.c.position))
    return StoredSet(**row._mapping), list(ordered.scalars())


def _may_ask(owner: str) -> ColumnElement[bool]:
    return question_sets.c.is_complete & question_sets.c.owner.in_((owner, EVERYONE))
