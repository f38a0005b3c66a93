"""Background jobs as their owners see them: started, listed, watched and cancelled.

They are kept in the records (`server/records/`) and run by `job_runner.py`, here or by another
server. Ids are made by the server. A job of another owner is like one that does not exist.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from crma.core.errors import NotFound
from server.records import jobs as rows
from server.records.jobs import Job
from server.service.errors import InvalidField, TooManyJobs
from server.service.job_runner import JobRunner

MAX_LISTED = 1000
LISTED = ("question_set", "variants", "scorer")
"""The fields of a request by which its owner tells jobs apart in a list; each is short."""


@dataclass(frozen=True)
class Jobs:
    """The jobs of one app.

    Args:
        runner: runs them, and has the records and the limits.
    """

    runner: JobRunner

    async def start(
        self,
        id: str,
        owner: str,
        request: Mapping[str, Any],
        spec: Mapping[str, Any],
        num_items: int,
    ) -> Job:
        """Record a job, which runs as soon as there is room.

        Args:
            id: that of the job.
            owner: whose job it is.
            request: kept for its owner.
            spec: from which a server runs it, JSON.
            num_items: of the work.

        Raises:
            InvalidField: this server runs no jobs at all.
            TooManyJobs: `max_waiting` jobs of the owner wait.
            RecordsError: it cannot be recorded, and does not run.
        """
        limits = self.runner.limits
        if limits.max_running == 0:
            message = "background: this server runs no background jobs (CRMA_MAX_ABLATION_JOBS=0)"
            raise InvalidField(message, field="background", value=True, allowed=False)
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        settings = {name: request[name] for name in LISTED if request.get(name) is not None}
        base = self.runner.base
        job = Job(id, owner, base, created, request, spec, num_items, settings=settings)

        def add(connection: Connection) -> None:
            num_waiting = rows.num_waiting(connection, owner)
            if num_waiting >= limits.max_waiting:
                message = f"{num_waiting} jobs are already waiting to run"
                raise TooManyJobs(message, allowed=f"<= {limits.max_waiting} that wait")
            rows.add(connection, job)
            rows.remove_old(connection, limits.max_kept, limits.kept_s)

        await self.runner.database.run(add)
        self.runner.wake()
        return job

    async def get(self, id: str, owner: str | None) -> Job:
        """Return a job of an owner, or anyone's, without its request.

        Raises NotFound, RecordsError.
        """
        return self._seen(await self._if_made(rows.find_listed, id, owner), id)

    async def get_with_result(self, id: str, owner: str | None) -> tuple[Job, str | None]:
        """Return a job, and its result as JSON if it is done. Raises as `get`."""

        def read(connection: Connection) -> tuple[Job | None, str | None]:
            job = rows.find(connection, id, owner)
            return job, None if job is None else rows.result_of(connection, id)

        job, result = await self.runner.database.run_if_made((None, None), read)
        return self._seen(job, id), result

    async def newest(self, owner: str | None) -> list[Job]:
        """Return the newest jobs of an owner, or everyone's, as `get` does. Raises RecordsError."""
        found = await self.runner.database.run_if_made([], rows.newest, owner, MAX_LISTED)
        return [self._seen(job, job.id) for job in found]

    async def cancel(self, id: str, owner: str | None) -> Job:
        """Cancel a job unless it has ended, wait until it has, and return it. Raises as `get`."""
        job = self._seen(await self._if_made(rows.cancel, id, owner), id)
        await self.runner.end(id)
        return job

    async def watch(
        self, id: str, owner: str | None, is_over: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[Job]:
        """Yield a job now and whenever it changes, until it has ended, or `is_over()`.

        Raises as `get`, also for a job that is removed meanwhile.
        """
        shown = None
        while not is_over():
            num_changes = self.runner.num_changes
            job = await self.get(id, owner)
            state = (job.num_done, job.status)
            if state != shown:
                yield job
                shown = state
            if job.has_ended or not await self.runner.change(num_changes):
                return

    async def _if_made(
        self, work: Callable[[Connection, str, str | None], Job | None], id: str, owner: str | None
    ) -> Job | None:
        return await self.runner.database.run_if_made(None, work, id, owner)

    def _seen(self, job: Job | None, id: str) -> Job:
        """A job as its owner sees it. Raises NotFound if there is none."""
        if job is None:
            allowed = "the id of a job that is kept"
            raise NotFound(f"no job {id!r}", field="id", value=id, allowed=allowed)
        error = self.runner.failed.get(job.id)
        return job if error is None else replace(job, status="failed", error=error)
