"""The acts of administrators, done or refused: in the log, in a file, and in the records.

An act is written once it is done or refused, and before its answer is sent. One that cannot be
written stays done: whoever unloads or deletes a bad adapter must not depend on a database that
answers. It is in the log then, and the failure is counted.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from crma.core.errors import ConfigError
from crma.core.files import PRIVATE
from crma.store.channels import BACKBONE, Change, channel_task
from server.records import audit as rows
from server.records.audit import Filter
from server.records.database import Database
from server.service.allowance import Allowance
from server.service.metrics import Metrics

log = logging.getLogger("server")
lines = logging.getLogger("server.audit")

MAX_BY_OTHERS = 60  # a minute
STORE = "the store"  # who does what its history says
PATIENCE_S = 10.0  # for the database; the answer waits
_MAX_TEXT = 1000  # characters of what a request can make as long as it likes
_OBJECTS = ("task", "name", "id", "key")


@dataclass
class Act:
    """What somebody did.

    Args:
        who: name of the caller.
        what: the act, as a verb.
        about: what it was done to: names, versions, digests. Values that are None are left out.
        result: "done", or the code of the error that it was answered with.
        tenant: of the caller; "": none.
        reason: the error in words; None: it was done.
        request_id: of the request; None: it was no request.
    """

    who: str
    what: str
    about: dict[str, Any] = field(default_factory=dict)
    result: str = "done"
    tenant: str = ""
    reason: str | None = None
    request_id: str | None = None

    def row(self, time: str) -> dict[str, Any]:
        """The act as the records have it."""
        about = self.about
        names = (about[each] for each in _OBJECTS if about.get(each) is not None)
        versions = about.get("versions", ())
        return {
            "time": time,
            "who": self.who,
            "tenant": self.tenant,
            "what": self.what,
            "object": _cut(next(names, None)),
            "version": about.get("version") or ",".join(versions) or None,
            "digest": about.get("digest"),
            "result": self.result,
            "reason": _cut(self.reason),
            "request_id": self.request_id,
        }


@dataclass(frozen=True)
class AuditLog:
    """Writes acts to the log, and to a file as JSON Lines that only its owner can read.

    The file is opened for each act, so that it may be moved away at any time.

    Args:
        file: None: the log only.
    """

    file: Path | None

    def check(self) -> None:
        """Raises ConfigError if the file cannot be written."""
        if self.file is not None:
            try:
                os.close(self._open(self.file))
            except OSError as error:
                reason = error.strerror or type(error).__name__
                message = f"{self.file} cannot be written: {reason}"
                raise ConfigError(message, field="audit_log") from error

    def write(self, act: Act, time: str) -> bool:
        """Write one act. It is done by now, so a file that fails is only an error of the log.

        Args:
            time: UTC, ISO 8601.

        Returns:
            Whether it is written.
        """
        about = {name: value for name, value in act.about.items() if value is not None}
        known = {"tenant": act.tenant or None, "reason": act.reason}
        more = {name: value for name, value in known.items() if value is not None}
        fields = {"who": act.who, **about, "result": act.result, **more}
        lines.info("%s", act.what, extra={"fields": {"request_id": act.request_id, **fields}})
        if self.file is None:
            return True
        if act.request_id is not None:
            fields["request_id"] = act.request_id
        line = json.dumps({"time": time, "what": act.what, **fields}) + "\n"
        try:
            descriptor = self._open(self.file)
            try:
                os.write(descriptor, line.encode())  # one write: lines of two servers do not mix
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("%s: %r is not in the audit log: %s", self.file, act.what, error)
            return False
        return True

    def _open(self, file: Path) -> int:
        # O_NONBLOCK: a named pipe that nobody reads is an error, instead of a wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(file, flags | os.O_CLOEXEC, PRIVATE)


class Audit:
    """Everything that administrators did, on every server of the database.

    Args:
        audit_log: has a line for each act.
        database: has a row for each act.
        metrics: count what could not be written.
    """

    def __init__(self, audit_log: AuditLog, database: Database, metrics: Metrics) -> None:
        self._log = audit_log
        self._database = database
        self._failures = metrics.record_failures
        self._others: dict[str, Allowance] = {}
        self._writing: set[asyncio.Task[None]] = set()

    async def write(self, act: Act) -> None:
        """Write one act; that it cannot be written is logged and counted, and raises nothing.

        It is written whether or not the caller is cancelled meanwhile.
        """
        await asyncio.shield(self._begin(act))

    async def write_limited(self, act: Act) -> None:
        """Write an act of a caller that is no administrator, as `write`: so many a minute of each.

        The access log has them all.
        """
        now = time.monotonic()
        allowance = self._others.setdefault(act.who, Allowance(MAX_BY_OTHERS, now))
        if not allowance.wait_s(1, now):
            allowance.spend(1, now)
            await self.write(act)

    def note_changes(self, changes: Sequence[Change]) -> None:
        """Begin to write what the store's history gained: commands on the machine are acts too."""
        for change in changes:
            self._begin(_change_of_store(change))

    async def stop(self) -> None:
        """Wait until everything is written."""
        await asyncio.gather(*self._writing)

    async def newest(self, wanted: Filter, limit: int) -> list[dict[str, Any]]:
        """The acts that are wanted, the newest first. Raises RecordsError."""
        return await self._database.run_if_made([], rows.newest, wanted, limit)

    def _begin(self, act: Act) -> asyncio.Task[None]:
        task = asyncio.create_task(self._write(act))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    async def _write(self, act: Act) -> None:
        now = _iso(datetime.now(UTC))
        if not await asyncio.to_thread(self._log.write, act, now):
            self._failures.labels("audit_log").inc()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._database.run(rows.add, act.row(now))
        except Exception as error:
            reason = str(error) or f"no answer within {PATIENCE_S:g} s"
            log.error("%r by %r is not in the records: %s", act.what, act.who, reason)
            self._failures.labels("audit").inc()


def remove_old(connection: Connection, kept_s: float) -> None:
    """Remove the acts that are older than so many seconds."""
    rows.remove_old(connection, _iso(datetime.now(UTC) - timedelta(seconds=kept_s)))


def _change_of_store(change: Change) -> Act:
    """The act that is a line of the store's history."""
    what = "stop" if change.after is None else change.action.replace("_", " ")
    about = {"name": BACKBONE}
    if change.channel != BACKBONE:
        about = {"task": channel_task(change.channel)}
    return Act(STORE, what, {**about, "version": change.after})


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")


def _cut(text: str | None) -> str | None:
    return None if text is None else text[:_MAX_TEXT]
