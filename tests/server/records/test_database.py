"""server.records.database: made, brought up to date, and refused with the reason."""

import asyncio
import sqlite3
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from crma.core.errors import ConfigError
from server.records import jobs, question_sets
from server.records.database import FILE, Database
from server.records.errors import RecordsNotWritable, RecordsUnavailable
from server.records.tables import metadata

Open = Callable[[], Database]
JOB = jobs.Job("abl-1", "", "base", "2026-01-01T00:00:00.000000+00:00", {"a": "\0\ud800"}, {}, 1)
LISTED = replace(JOB, request={})


async def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection), metadata)

    assert await database.run(differences) == []


async def test_two_servers_that_start_at_once_make_the_tables_once(open_database: Open) -> None:
    both = [open_database() for _ in range(2)]
    assert await asyncio.gather(*(one.run(jobs.newest, "", 1) for one in both)) == [[], []]


async def test_a_transaction_that_fails_changes_nothing(database: Database) -> None:
    def fail(connection: Connection) -> None:
        jobs.add(connection, JOB)
        raise KeyError

    with pytest.raises(KeyError):
        await database.run(fail)
    assert await database.run(jobs.find, JOB.id, "") is None


async def test_texts_may_hold_any_character(open_database: Open) -> None:
    first, second = open_database(), open_database()
    await first.run(jobs.add, JOB)
    assert await second.run(jobs.find, JOB.id, "") == JOB


async def test_a_name_with_a_nul_is_nobodys(database: Database) -> None:
    """PostgreSQL refused the query, and whoever sent such an id got a 500."""
    await database.run(jobs.add, JOB)
    for name in ("abl-1\0", "\0"):
        assert await database.run(jobs.find, name, "") is None
        assert await database.run(jobs.cancel, name, "") is None
        assert await database.run(question_sets.find, name, "") is None


async def test_the_database_of_a_newer_release_is_refused(open_database: Open) -> None:
    def change(connection: Connection) -> None:
        connection.execute(text("update alembic_version set version_num = '9999'"))

    await open_database().run(change)
    with pytest.raises(RecordsUnavailable, match="newer release"):
        await open_database().run(jobs.newest, "", 1)


async def test_nothing_is_written_before_it_is_needed_and_nobody_else_reads_it(
    tmp_path: Path,
) -> None:
    database = Database(tmp_path / "kept")
    assert await database.run_if_made([], jobs.newest, "", 1) == []
    assert not (tmp_path / "kept").exists()
    await database.run(jobs.add, JOB)
    assert await database.run_if_made([], jobs.newest, "", 1) == [LISTED]
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    files = list((tmp_path / "kept").glob(f"{FILE}*"))
    assert len(files) == 3  # with its log and index
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    database.close()


async def test_a_folder_that_cannot_be_made_is_named_and_a_mended_one_is_used(
    tmp_path: Path,
) -> None:
    (tmp_path / "kept").write_text("in the way")
    database = Database(tmp_path / "kept")
    with pytest.raises(RecordsNotWritable, match="kept"):
        await database.run(jobs.add, JOB)
    (tmp_path / "kept").unlink()
    await database.run(jobs.add, JOB)
    database.close()


async def test_a_full_disk_is_told_apart_and_later_work_goes_on(tmp_path: Path) -> None:
    database = Database(tmp_path)

    def limit(connection: Connection, num_pages: int) -> None:
        connection.exec_driver_sql(f"pragma max_page_count={num_pages}")

    def fill(connection: Connection) -> None:
        limit(connection, 1)  # SQLite raises it to the present size
        jobs.add(connection, JOB, "x" * 2**20)

    with pytest.raises(RecordsNotWritable, match="full"):
        await database.run(fill)
    await database.run(limit, 2**30)
    await database.run(jobs.add, JOB)
    database.close()


async def test_a_database_that_another_process_holds_is_unavailable_and_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.records.database._BUSY_S", 0.01)
    database = Database(tmp_path)
    await database.run(jobs.add, JOB)
    holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    holder.execute("begin immediate")
    with pytest.raises(RecordsUnavailable, match="locked"):
        await database.run(jobs.newest, "", 1)
    holder.execute("rollback")
    holder.close()
    assert await database.run(jobs.newest, "", 1) == [LISTED]
    database.close()


async def test_a_server_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    database = Database(tmp_path, f"postgresql:///crma?host={tmp_path}")
    with pytest.raises(RecordsUnavailable, match="does not answer"):
        await database.run(jobs.newest, "", 1)
    database.close()


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "secret", "postgresql://h:port/secret"])
def test_any_other_url_is_refused_without_showing_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(tmp_path, url)
    assert caught.value.field == "database_url"
    assert "secret" not in str(vars(caught.value))


def test_a_missing_driver_is_named_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'crma-server\[postgres\]'"):
        Database(tmp_path, "postgresql://u@h/d")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_server_that_was_restarted_is_connected_to_again(open_database: Open) -> None:
    first, second = open_database(), open_database()
    await first.run(jobs.add, JOB)

    def end_the_others(connection: Connection) -> None:
        others = "select pg_terminate_backend(pid) from pg_stat_activity"
        connection.execute(text(f"{others} where pid <> pg_backend_pid() and usename = 'crma'"))

    await second.run(end_the_others)
    assert await first.run(jobs.find, JOB.id, "") == JOB
