"""Runs background jobs: takes them from the records, keeps what finishes, gives back what is left.

A job is anybody's who can run it. This server takes one that waits, or one whose server has not
renewed its lease in time, and goes on after the items that are finished. It never takes or changes
a job that another server runs.
"""

import asyncio
import json
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection

from crma.core.errors import CrmaError
from server.records import jobs as rows
from server.records import question_sets
from server.records.database import Database
from server.records.errors import RecordsError, RecordsNotWritable, RecordsUnavailable
from server.records.jobs import Job, Status
from server.service.errors import STOPPING

log = logging.getLogger("server")

_TICKS_BETWEEN_CLEANINGS = 60


class LeaseLost(Exception):
    """Another server runs the job by now, or it was cancelled: nothing more may be written."""


@dataclass(frozen=True)
class JobLimits:
    """Limits on background jobs.

    Args:
        max_running: jobs that this server runs at once; 0: it runs none.
        max_waiting: jobs of one owner that wait.
        max_kept: jobs of one owner that are kept; the oldest that has ended is removed first.
        kept_s: seconds for which a job is kept once it has ended, and for which one waits.
    """

    max_running: int
    max_waiting: int
    max_kept: int
    kept_s: float


@dataclass(eq=False)
class RunningJob:
    """A job that this server has taken.

    Args:
        job: as it was taken.
        lease: the name of the claim.
        outcomes: of the items that were finished before, by position.
        keep: records the outcome of an item, given its position and JSON. It raises LeaseLost, or
            RecordsNotWritable.
    """

    job: Job
    lease: str
    outcomes: Mapping[int, Any]
    keep: Callable[[int, Any], Awaitable[None]]


Work = Callable[[RunningJob], Awaitable[dict[str, Any]]]


@dataclass(eq=False)
class JobRunner:
    """The jobs that this server runs.

    Args:
        database: where all jobs are.
        base: only jobs that need this are taken.
        work: runs a job from its spec and returns its result.
        is_ready: whether jobs can run now.
        limits: of this server.
        poll_s: seconds between looks at the records.
        lease_s: a server that has not written for so long has lost its jobs.
        also_clean: removes what is old of other records, when old jobs are removed.

    Attributes:
        failed: id -> reason, of jobs that failed and whose end cannot be recorded yet.
        num_changes: how often a job here made progress or ended.
    """

    database: Database
    base: str
    work: Work
    is_ready: Callable[[], bool]
    limits: JobLimits
    poll_s: float = 1.0
    lease_s: float = 30.0
    also_clean: Callable[[Connection], None] = lambda _: None
    failed: dict[str, str] = field(default_factory=dict, init=False)
    num_changes: int = field(default=0, init=False)
    _server: str = field(init=False)
    _running: dict[str, tuple[str, asyncio.Task[None]]] = field(default_factory=dict, init=False)
    _loop: asyncio.Task[None] | None = field(default=None, init=False)
    _wanted: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _is_stopping: bool = field(default=False, init=False)
    _problem: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._server = f"{socket.gethostname()[:24]}-{uuid.uuid4().hex[:12]}"

    def start(self) -> None:
        """Take and run jobs from now on."""
        self._loop = asyncio.create_task(self._look_again_and_again())

    async def stop(self) -> None:
        """Stop, and give back the jobs that have not ended, for the next server."""
        self._is_stopping = True
        self._notify()
        self.wake()
        if self._loop is not None:
            await asyncio.wait(
                {self._loop}
            )  # not cancelled: a job that it takes just now is given back below
        tasks = [task for _, task in self._running.values()]
        leases = self._leases()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            if leases:
                await self.database.run(rows.release, leases, is_orderly=True)
        except RecordsError as error:  # their leases end by themselves
            log.error("background jobs are not given back: %s", error.message)

    def wake(self) -> None:
        """Look for jobs now instead of at the next poll."""
        self._wanted.set()

    async def end(self, id: str) -> None:
        """End a job here whose end is recorded already, if this server runs it."""
        _, task = self._running.get(id, ("", None))
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._notify()

    async def change(self, since: int) -> bool:
        """Wait until some job may have changed. False: this server is stopping.

        Args:
            since: `num_changes` before the caller last looked.
        """
        if self.num_changes == since and not self._is_stopping:
            await _until(self._changed, self.poll_s)  # another server may have written
        return not self._is_stopping

    async def _look_again_and_again(self) -> None:
        num_ticks = 0
        while not self._is_stopping:
            self._wanted.clear()
            try:
                await self._look(is_cleaning=num_ticks % _TICKS_BETWEEN_CLEANINGS == 0)
                self._problem = None
            except RecordsError as error:
                if error.message != self._problem:  # once, not at every look
                    log.error("background jobs wait: %s", error.message)
                self._problem = error.message
            except Exception:
                log.exception("background jobs wait")
            num_ticks += 1
            await _until(self._wanted, self.poll_s)

    async def _look(self, *, is_cleaning: bool) -> None:
        """Renew the leases, and take as many jobs as can run."""
        leases = self._leases()
        held = set(leases)
        if leases:
            held = await self.database.run(rows.renew, leases, self.lease_s)
        for id in leases.keys() - held:
            log.warning("job %s is not this server's any more", id)
            await self.end(id)
        if is_cleaning:
            await self.database.run_if_made(None, _clean, self.limits)
            await self.database.run_if_made(None, self.also_clean)
        while self._has_room():
            lease = f"{self._server}-{uuid.uuid4().hex[:8]}"
            taken = await self.database.run_if_made(None, _take, self.base, lease, self.lease_s)
            if taken is None:
                return
            job, outcomes = taken
            await self.end(job.id)  # this server was so late that it takes its own job
            running = RunningJob(job, lease, outcomes, partial(self._keep, job.id, lease))
            task = asyncio.create_task(self._run(running))
            self._running[job.id] = (lease, task)
            task.add_done_callback(partial(self._forget, job.id))

    def _has_room(self) -> bool:
        has_room = len(self._running) < self.limits.max_running
        return has_room and not self._is_stopping and self.is_ready()

    def _leases(self) -> dict[str, str]:
        return {id: lease for id, (lease, _) in self._running.items()}

    async def _keep(self, id: str, lease: str, position: int, outcome: Any) -> None:
        """Record a finished item, however long the database does not answer."""
        while True:
            try:
                kept = await self.database.run(
                    rows.keep_outcome, id, lease, self.lease_s, position, outcome
                )
            except RecordsUnavailable:
                await asyncio.sleep(self.poll_s)
                continue
            if not kept:
                raise LeaseLost(id)
            self._notify()
            return

    async def _run(self, running: RunningJob) -> None:
        job = running.job
        try:
            status, error, result = await self._outcome(running)
            await self._record_end(running, status, error, result)
        except LeaseLost:
            log.warning("job %s is not this server's any more", job.id)
        except STOPPING:
            with suppress(RecordsError):  # then its lease ends by itself
                await self.database.run(rows.release, {job.id: running.lease}, is_orderly=False)
        except Exception:
            log.exception("job %s is left to its lease", job.id)

    def _forget(self, id: str, task: asyncio.Task[None]) -> None:
        """A task has ended, or was cancelled before it began: there is room for another job."""
        if self._running.get(id, ("", None))[1] is task:
            del self._running[id]
        self.failed.pop(id, None)
        self._notify()
        self.wake()

    async def _outcome(self, running: RunningJob) -> tuple[Status, str | None, str | None]:
        """Run a job. Returns how it ended, why it failed, and its result as JSON.

        Raises:
            LeaseLost: as the class says.
            STOPPING: this server can run nothing any more.
        """
        job = running.job
        if job.num_attempts > rows.MAX_ATTEMPTS:
            tries = f"{rows.MAX_ATTEMPTS} times"
            return "failed", f"the server ended {tries} while it ran the same items", None
        try:
            result = await self.work(running)
            return "done", None, await asyncio.to_thread(json.dumps, result, allow_nan=False)
        except (LeaseLost, *STOPPING):
            raise
        except CrmaError as error:
            return "failed", error.message, None
        except Exception:
            log.exception("job %s failed", job.id)
            return "failed", "the server failed; its log has the reason", None

    async def _record_end(
        self, running: RunningJob, status: Status, error: str | None, result: str | None
    ) -> None:
        """Record how a job ended, as soon as it can be written. Raises LeaseLost."""
        id = running.job.id
        while True:
            try:
                is_kept = await self.database.run(
                    rows.finish, id, running.lease, status, error, result
                )
            except RecordsNotWritable as problem:
                if status == "done":
                    error = f"the result could not be kept: {problem.message}"
                    status, result = "failed", None
                self.failed[id] = error or problem.message
                self._notify()
            except RecordsUnavailable:
                pass
            else:
                if not is_kept:
                    raise LeaseLost(id)
                return
            await asyncio.sleep(self.poll_s)

    def _notify(self) -> None:
        """Wake everyone who waits for a change."""
        self.num_changes += 1
        self._changed.set()
        self._changed = asyncio.Event()


async def _until(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for an event, for at most some seconds.

    `asyncio.wait_for` could lose the cancellation that comes together with the event.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


def _take(
    connection: Connection, base: str, lease: str, lease_s: float
) -> tuple[Job, dict[int, Any]] | None:
    """Claim a job and read the outcomes that it has already."""
    job = rows.claim(connection, base, lease, lease_s)
    return None if job is None else (job, rows.outcomes_of(connection, job.id))


def _clean(connection: Connection, limits: JobLimits) -> None:
    """Remove what is old, and what came of uploads whose senders have gone."""
    before = datetime.now(UTC) - timedelta(seconds=limits.kept_s)
    error = f"no server ran it within {limits.kept_s:g} s"
    rows.expire(connection, before.isoformat(timespec="microseconds"), error)
    rows.remove_old(connection, limits.max_kept, limits.kept_s)
    question_sets.remove_abandoned(connection)
