"""server.records.usage: sums that several servers add to, each write once."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from server.records import usage
from server.records.database import Database
from server.records.usage import COUNTS, Amount, Column, Filter, Use, Write

Open = Callable[[], Database]
LEGAL = Use("2026-01-02", "web", "legal", "sha256:1", True)
BASE = Use("2026-01-03", "lab", "", "", False)
ONE = Amount(1, 20, 5, 7)
ALL = Filter("2026-01-01", "2026-12-31")
EACH: Sequence[Column] = ("day", "key", "task", "task_digest", "crma")


async def sums(
    database: Database, wanted: Filter = ALL, by: Sequence[Column] = EACH, limit: int = 100
) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in await database.run(usage.totals, wanted, by, limit)]


async def test_what_is_added_is_added_to_what_was_there(database: Database) -> None:
    await database.run(usage.add, Write("s", 1, "2026-01-02"), {LEGAL: ONE})
    await database.run(usage.add, Write("s", 2, "2026-01-03"), {LEGAL: ONE, BASE: ONE})
    assert await sums(database) == [(*LEGAL, 2, 40, 10, 14), (*BASE, *ONE)]


async def test_a_write_whose_answer_was_lost_counts_once_when_it_is_tried_again(
    database: Database,
) -> None:
    for _ in range(2):
        await database.run(usage.add, Write("s", 1, "2026-01-02"), {LEGAL: ONE})
    await database.run(usage.add, Write("other", 1, "2026-01-02"), {LEGAL: ONE})
    assert await sums(database, by=()) == [(2, 40, 10, 14)]


async def test_servers_that_write_the_same_rows_at_once_wait_for_each_other_and_lose_nothing(
    open_database: Open,
) -> None:
    uses = [Use("2026-01-02", f"key{number}", "", "", False) for number in range(40)]

    async def write(server: str, order: list[Use]) -> None:
        database = open_database()
        for number in range(10):
            amounts = dict.fromkeys(order, ONE)
            await database.run(usage.add, Write(server, number + 1, "2026-01-02"), amounts)

    await asyncio.gather(
        write("a", uses), write("b", uses[::-1]), write("c", uses[20:] + uses[:20])
    )
    assert await sums(open_database(), by=()) == [tuple(1200 * each for each in ONE)]


async def test_sums_are_by_the_columns_that_are_asked_for(database: Database) -> None:
    other = LEGAL._replace(day="2026-01-05", task_digest="sha256:2")
    amounts = {LEGAL: ONE, other: ONE, BASE: ONE}
    await database.run(usage.add, Write("s", 1, "2026-01-05"), amounts)
    assert await sums(database, by=["task"]) == [("", *ONE), ("legal", 2, 40, 10, 14)]
    assert await sums(database, by=["key", "crma"]) == [
        ("lab", False, *ONE),
        ("web", True, 2, 40, 10, 14),
    ]
    assert len(await sums(database, limit=2)) == 2
    (total,) = await database.run(usage.totals, ALL, (), 1)
    assert [type(total[name]) for name in COUNTS] == [int] * 4


async def test_days_keys_and_tasks_narrow_the_sums(database: Database) -> None:
    amounts = {LEGAL: ONE, BASE: ONE}
    await database.run(usage.add, Write("s", 1, "2026-01-03"), amounts)

    async def days(**wanted: Any) -> list[str]:
        given = {"first_day": "2026-01-01", "last_day": "2026-12-31", **wanted}
        return [row[0] for row in await sums(database, Filter(**given), by=["day"])]

    assert await days() == ["2026-01-02", "2026-01-03"]
    assert await days(first_day="2026-01-03") == ["2026-01-03"]
    assert await days(last_day="2026-01-02") == ["2026-01-02"]
    assert await days(task="") == await days(key="lab") == ["2026-01-03"]
    assert await days(task="legal", seen_by="web") == ["2026-01-02"]
    assert await days(key="lab", seen_by="web") == []
    assert await sums(database, Filter("2027-01-01", "2027-01-02"), by=()) == []


async def test_counts_may_be_larger_than_32_bits(database: Database) -> None:
    large = Amount(1, 2**40, 0, 2**40)
    for number in (1, 2):
        await database.run(usage.add, Write("s", number, "2026-01-02"), {LEGAL: large})
    assert await sums(database, by=()) == [(2, 2**41, 0, 2**41)]


async def test_old_days_are_removed_and_a_server_that_was_idle_writes_again(
    database: Database,
) -> None:
    await database.run(usage.add, Write("s", 1, "2026-01-02"), {LEGAL: ONE, BASE: ONE})
    await database.run(usage.remove_old, "2026-01-03")
    assert await sums(database) == [(*BASE, *ONE)]
    await database.run(usage.add, Write("s", 2, "2026-01-03"), {BASE: ONE})
    assert await sums(database) == [(*BASE, 2, 40, 10, 14)]
