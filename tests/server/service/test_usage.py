"""server.service.usage: added up in memory, written every few seconds, each request once."""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from prometheus_client import CollectorRegistry

from crma.core.selection import AdapterSelection
from server.engine.request import FinishReason, Request
from server.records import usage as rows
from server.records.database import Database
from server.records.errors import RecordsUnavailable
from server.records.usage import Filter
from server.service.metrics import Metrics
from server.service.outcome import Outcome
from server.service.usage import Usage, remove_old

Open = Callable[[], Database]
ALL = Filter("2000-01-01", "2999-12-31")


def made(database: Database, flush_s: float = 60.0) -> Usage:
    return Usage(database, flush_s, Metrics(CollectorRegistry()))


def outcome(task: str | None = "legal", crma: str | None = None) -> Outcome:
    """Three tokens of which the cache had two, and answers of four and one."""
    digest = None if task is None else f"sha256:{task}"
    request = Request("gen-1", (1, 2, 3), selection=AdapterSelection(digest, crma))
    return Outcome(
        request=request,
        task=task,
        labels=("legal", "off"),
        reasons=(FinishReason.STOP, FinishReason.STOP),
        output_tokens=(4, 1),
        cached_tokens=2,
        timings=None,
        error=None,
        own_deadline=False,
    )


async def num_requests(usage: Usage) -> int:
    return sum(row["requests"] for row in await usage.totals(ALL, ()))


async def test_requests_are_added_up_by_day_key_task_and_switch(database: Database) -> None:
    usage = made(database)
    for task, crma in (("legal", None), ("legal", None), ("legal", "sha256:c"), (None, None)):
        usage.count("web", outcome(task, crma))
    await usage.flush()
    day = datetime.now(UTC).date().isoformat()
    found = await usage.totals(ALL, ("day", "task", "task_digest", "crma"))
    assert [tuple(row.values()) for row in found] == [
        (day, "", "", False, 1, 3, 2, 5),
        (day, "legal", "sha256:legal", False, 2, 6, 4, 10),
        (day, "legal", "sha256:legal", True, 1, 3, 2, 5),
    ]


async def test_nothing_is_written_while_nothing_is_used(database: Database) -> None:
    await made(database).flush()
    assert not database._is_open


async def test_usage_is_written_by_itself(database: Database) -> None:
    usage = made(database, flush_s=0.001)
    usage.start()
    usage.count("web", outcome())
    async with asyncio.timeout(10):
        while await num_requests(usage) != 1:
            await asyncio.sleep(0.001)
    await usage.stop()


async def test_stop_writes_what_is_left(database: Database) -> None:
    usage = made(database)
    usage.start()
    usage.count("web", outcome())
    await usage.stop()
    assert await num_requests(usage) == 1


async def test_a_write_that_was_done_but_not_answered_is_not_done_twice(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection breaks while the server waits for the answer to its commit."""
    usage = made(database)
    run = database.run

    async def run_without_answer(*arguments: Any) -> Any:
        await run(*arguments)
        raise RecordsUnavailable("the connection is broken")

    with monkeypatch.context() as broken:
        broken.setattr(database, "run", run_without_answer)
        usage.count("web", outcome())
        await usage.flush()
        usage.count("web", outcome())  # waits for the next write
        await usage.flush()
    assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 1
    await usage.stop()
    assert await num_requests(usage) == 2
    assert usage._failures._value.get() == 2


KILLED = """
import os, signal, sys  # as kill -9 ends a server
sys.path[:0] = sys.argv[2:]
import asyncio
from pathlib import Path
from test_usage import made, outcome
from server.records.database import Database

async def run():
    usage = made(Database(Path(sys.argv[1])))
    for number in range(10):
        usage.count("web", outcome())
    await usage.flush()
    usage.count("web", outcome())
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run())
"""


async def test_a_server_that_is_killed_loses_what_came_since_the_last_write_and_no_more(
    tmp_path: Path,
) -> None:
    folders = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(tmp_path), *folders
    )
    assert await killed.wait() == -signal.SIGKILL
    database = Database(tmp_path)
    assert await num_requests(made(database)) == 10
    database.close()


async def test_a_server_that_ends_without_its_database_says_what_is_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: Any) -> Any:
        raise RecordsUnavailable("no answer")

    monkeypatch.setattr(database, "run", refuse)
    usage = made(database)
    for _ in range(3):
        usage.count("web", outcome())
        await usage.flush()
    await usage.stop()
    assert "the usage of 3 requests is lost" in caplog.text


async def test_memory_is_bounded_while_the_database_does_not_answer(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.service.usage._MAX_WAITING", 2)
    usage = made(database)
    for key in ("a", "b", "c", "a"):
        usage.count(key, outcome())
    assert usage._failures._value.get() == 1
    await usage.flush()
    assert await num_requests(usage) == 3


async def test_servers_of_one_database_add_to_the_same_sums(open_database: Open) -> None:
    servers = [made(open_database()) for _ in range(2)]
    for usage in servers:
        usage.count("web", outcome())
    await asyncio.gather(*(usage.flush() for usage in servers))
    assert len(await servers[0].totals(ALL, ("key", "task", "crma"))) == 1
    assert await num_requests(servers[0]) == 2


async def test_days_are_kept_as_long_as_is_set(database: Database) -> None:
    usage = made(database)
    usage.count("web", outcome())
    await usage.flush()
    await database.run(remove_old, 0.0)  # not the day that is not over
    assert await num_requests(usage) == 1
    await database.run(remove_old, -86_400.0)
    assert await database.run(rows.totals, ALL, ("day",), 1) == []
