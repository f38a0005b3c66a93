"""server.records.migrations: what an older release recorded is there after each change."""

from collections.abc import Callable
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect

from server.records import audit, jobs, question_sets, usage
from server.records.audit import Filter
from server.records.database import Database

Open = Callable[[], Database]
JOB = jobs.Job("abl-1", "web", "base", "2026-01-01T00:00:00.000000+00:00", {"a": "\0\ud800"}, {}, 2)


def old_release(monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    """Let databases be made as the release of a revision made them."""
    upgrade = command.upgrade

    def up_to_then(config: Config, _: str) -> None:
        upgrade(config, revision)

    monkeypatch.setattr(command, "upgrade", up_to_then)
    known = [column for column in jobs._COLUMNS if column.name != "settings"]  # of 0003
    monkeypatch.setattr(jobs, "_COLUMNS", known)


def fill(connection: Connection) -> None:
    """What revision 0001 kept: a job with an outcome, and a question set."""
    jobs.add(connection, JOB)
    jobs.claim(connection, "base", "lease", 60)
    jobs.keep_outcome(connection, JOB.id, "lease", 60, 1, {"score": 1})
    question_sets.begin(connection, "s1", "", "mine", 60)
    question_sets.add_questions(connection, "s1", 0, [{"id": "q1"}], 60)
    question_sets.complete(connection, "s1", "sha256:1", 1)


def contents(connection: Connection) -> Any:
    return (
        jobs.find(connection, JOB.id, "web"),
        jobs.outcomes_of(connection, JOB.id),
        question_sets.find(connection, "mine", "web"),
    )


async def test_jobs_and_question_sets_of_the_first_release_are_kept_by_the_second(
    open_database: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        old_release(patched, "0001")
        old = open_database()
        await old.run(fill)
        before = await old.run(contents)
        assert not await old.run(lambda connection: inspect(connection).has_table("audit"))
    new = open_database()
    assert await new.run(contents) == before
    assert before[0].num_done == 1
    assert await new.run(audit.newest, Filter(), 10) == []
    assert await new.run(usage.totals, usage.Filter("2000-01-01", "2100-01-01"), (), 1) == []
    # A server of the old release that runs on meanwhile goes on with its job.
    assert await old.run(jobs.keep_outcome, JOB.id, "lease", 60, 0, {"score": 0})
    assert (await new.run(jobs.find, JOB.id, "web")).num_done == 2
