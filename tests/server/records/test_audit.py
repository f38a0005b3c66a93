"""server.records.audit: acts, the newest first."""

from typing import Any

from server.records import audit
from server.records.audit import Filter
from server.records.database import Database

ACT: dict[str, Any] = {
    "time": "2026-01-01T00:00:00.000+00:00",
    "who": "boss",
    "tenant": "acme",
    "what": "pin",
    "object": "le\0g\ud800al",
    "version": "v1",
    "digest": "sha256:1",
    "result": "not_found",
    "reason": "no task 'le\0gal'",
    "request_id": "r1",
}


async def shown(database: Database, limit: int = 10, **wanted: Any) -> list[tuple[str, str]]:
    acts = await database.run(audit.newest, Filter(**wanted), limit)
    return [(act["who"], act["what"]) for act in acts]


async def test_an_act_is_kept_as_it_was(database: Database) -> None:
    await database.run(audit.add, ACT)
    (act,) = await database.run(audit.newest, Filter(), 10)
    assert {**act, "id": 0} == {**ACT, "id": 0}


async def test_acts_are_listed_newest_first_page_by_page_and_by_key_and_act(
    database: Database,
) -> None:
    for who, what in (("a", "pin"), ("b", "pin"), ("a", "delete")):
        await database.run(audit.add, {**ACT, "who": who, "what": what})
    assert await shown(database) == [("a", "delete"), ("b", "pin"), ("a", "pin")]
    page = await database.run(audit.newest, Filter(), 2)
    assert [act["who"] for act in page] == ["a", "b"]
    assert await shown(database, before=page[-1]["id"]) == [("a", "pin")]
    assert await shown(database, who="a") == [("a", "delete"), ("a", "pin")]
    assert await shown(database, what="pin", who="b") == [("b", "pin")]


async def test_old_acts_are_removed_and_their_ids_are_not_given_out_again(
    database: Database,
) -> None:
    await database.run(audit.add, ACT)
    await database.run(audit.add, {**ACT, "time": "2026-01-02T00:00:00.000+00:00", "who": "new"})
    await database.run(audit.remove_old, "2026-01-02T00:00:00.000+00:00")
    assert await shown(database) == [("new", "pin")]
