"""Acts of administrators: in the log, a private file and the records, and never in the way."""

import asyncio
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from crma.core.errors import ConfigError
from server.records.audit import Filter
from server.records.database import Database
from server.service import usage
from server.service.audit import MAX_BY_OTHERS, Act, Audit, AuditLog, remove_old
from server.service.metrics import Metrics
from server.settings import MAX_KEPT_SECONDS, Settings

TIME = "2026-01-01T00:00:00.000+00:00"


def made(database: Database, file: Path | None = None) -> Audit:
    return Audit(AuditLog(file), database, Metrics(CollectorRegistry()))


def num_failures(audit: Audit, record: str) -> float:
    return audit._failures.labels(record)._value.get()


async def listed(audit: Audit) -> list[dict[str, Any]]:
    return await audit.newest(Filter(), 1000)


# The file --------------------------------------------------------------------------------------


def test_acts_are_appended_as_json_lines_to_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    audit = AuditLog(file)
    audit.check()
    assert audit.write(Act("boss", "pin", {"task": "legal", "version": None}), TIME)
    file.rename(tmp_path / "old")  # as log rotation does
    refused = {"tenant": "acme", "reason": "none", "request_id": "r"}
    assert audit.write(Act("boss", "unpin", {"task": "le\ngal"}, "not_found", **refused), TIME)
    lines = [json.loads(path.read_text()) for path in (tmp_path / "old", file)]
    one = {"time": TIME, "what": "pin", "who": "boss", "task": "legal", "result": "done"}
    other = {"time": TIME, "what": "unpin", "who": "boss", "task": "le\ngal"}
    assert lines == [one, {**other, "result": "not_found", **refused}]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_server_does_not_start_on_an_audit_log_that_cannot_be_written(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # whose reader the start waited for
    os.mkfifo(pipe)
    for file in (tmp_path, tmp_path / "nowhere" / "audit.jsonl", pipe):
        with pytest.raises(ConfigError) as caught:
            AuditLog(file).check()
        assert caught.value.field == "audit_log"


def test_an_act_that_cannot_be_written_is_an_error_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert not AuditLog(tmp_path).write(Act("boss", "pin"), TIME)
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]


# The records -----------------------------------------------------------------------------------


async def test_an_act_is_in_the_records_with_what_it_was_done_to(database: Database) -> None:
    audit = made(database)
    deleted = {"task": "legal", "versions": ("v1", "v2")}
    await audit.write(Act("boss", "pin", {"task": "legal", "version": "v1", "digest": "sha256:1"}))
    await audit.write(Act("boss", "delete", deleted, tenant="acme", request_id="r"))
    await audit.write(Act("file of keys", "revoke key", {"key": "web"}))
    await audit.write(Act("boss", "publish", {}, "invalid_field", reason="x" * 5000))
    refused, key, delete, pin = await listed(audit)
    assert (pin["object"], pin["version"], pin["digest"]) == ("legal", "v1", "sha256:1")
    assert (delete["version"], delete["tenant"], delete["request_id"]) == ("v1,v2", "acme", "r")
    assert (key["object"], key["version"], key["reason"]) == ("web", None, None)
    assert (refused["object"], refused["result"], len(refused["reason"])) == (
        None,
        "invalid_field",
        1000,
    )
    assert pin["time"] <= delete["time"] <= key["time"]


async def test_records_that_cannot_be_written_are_counted_and_raise_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kept").write_text("in the way")
    database = Database(tmp_path / "kept")
    audit = made(database, tmp_path)
    await audit.write(Act("boss", "unload", {"task": "legal"}))
    assert [num_failures(audit, record) for record in ("audit", "audit_log")] == [1, 1]
    assert "'unload' by 'boss' is not in the records" in caplog.text
    (tmp_path / "kept").unlink()
    await audit.write(Act("boss", "pin"))
    assert [act["what"] for act in await listed(audit)] == ["pin"]
    database.close()


async def test_a_database_that_hangs_holds_an_answer_up_for_a_while_only(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.service.audit.PATIENCE_S", 0.01)
    answered = asyncio.Event()

    async def hang(*_: Any) -> None:
        await answered.wait()

    monkeypatch.setattr(database, "run", hang)
    audit = made(database)
    async with asyncio.timeout(10):
        await audit.write(Act("boss", "pin"))
    assert num_failures(audit, "audit") == 1


async def test_an_act_whose_request_is_cancelled_meanwhile_is_written(database: Database) -> None:
    audit = made(database)
    writing = asyncio.create_task(audit.write(Act("boss", "pin")))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await audit.stop()
    assert [act["what"] for act in await listed(audit)] == ["pin"]


async def test_only_so_many_others_of_one_key_are_written_in_a_minute(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.service.audit.time.monotonic", lambda: 1.0)
    audit = made(database)
    for _ in range(MAX_BY_OTHERS + 5):
        await audit.write_limited(Act("web", "delete", result="forbidden"))
    await audit.write_limited(Act("lab", "delete", result="forbidden"))
    assert len(await listed(audit)) == MAX_BY_OTHERS + 1


async def test_acts_are_kept_as_long_as_is_set(database: Database) -> None:
    audit = made(database)
    await audit.write(Act("boss", "pin"))
    await database.run(remove_old, 3600.0)
    assert len(await listed(audit)) == 1
    await database.run(remove_old, -1.0)
    assert await listed(audit) == []


async def test_the_longest_that_acts_may_be_kept_is_a_time_that_dates_have(
    database: Database,
) -> None:
    """A longer one would end every look at old records."""
    audit = made(database)
    await audit.write(Act("boss", "pin"))
    for name, remove in (("audit_kept_s", remove_old), ("usage_kept_s", usage.remove_old)):
        kept_s = getattr(Settings(**{name: MAX_KEPT_SECONDS}), name)
        await database.run(remove, kept_s)
        with pytest.raises(ValidationError):
            Settings(**{name: MAX_KEPT_SECONDS + 1})
    assert len(await listed(audit)) == 1
