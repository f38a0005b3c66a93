"""Background jobs: started, watched, cancelled, and kept on disk as one JSON file per job.

A record is {"id", "status", "created", "request", "progress", "error", "result"}. It is written
when the job starts and again when it ends. If a record still says "running" when the server starts,
the job was interrupted.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from crma.core.errors import CrmaError, NotFound
from crma.core.files import PRIVATE, locked, replace_file, to_json
from server.service.errors import InvalidField, TooManyJobs

log = logging.getLogger("server")

Status = Literal["running", "done", "failed", "cancelled", "interrupted"]
Count = Callable[[], None]
Work = Callable[[Count], Awaitable[dict[str, Any]]]  # calls `Count` after each item

_ID = re.compile(r"[a-z]+-[0-9a-f]{32}")


@dataclass
class Job:
    """A background job.

    Args:
        id: `<letters>-<32 hexadecimal digits>`.
        created: UTC, ISO 8601.
        request: what was asked.
        progress: number of items "done" and in "total".
        status: "running", or how it ended.
        error: why it failed.
        owner: name of the caller that it belongs to.
    """

    id: str
    created: str
    request: dict[str, Any]
    progress: dict[str, int]
    status: Status = "running"
    error: str | None = None
    owner: str = ""


@dataclass(eq=False)
class Jobs:
    """The jobs of one folder, which is created when the first job starts.

    Ids are made by the server and looked up in memory; an id from a request never becomes a path.

    Args:
        folder: where the records are.
        max_running: limit on jobs that run at once.
        max_kept: limit on records on disk; the oldest job that has ended is removed first.
    """

    folder: Path
    max_running: int
    max_kept: int
    _jobs: dict[str, Job] = field(default_factory=dict, init=False)  # oldest first
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)  # running
    # Set and replaced whenever any job makes progress or ends.
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _stopping: bool = field(default=False, init=False)

    def load(self) -> None:
        """Read the records in the folder. Files that are not records are logged and left alone."""
        found = []
        for path in self.folder.glob("*.json"):
            try:
                found.append(self._read(path))
            except (OSError, ValueError, KeyError, TypeError, RecursionError, CrmaError) as error:
                log.warning("%s is not a job's record or cannot be updated: %s", path, error)
        found.sort(key=lambda job: job.created)
        self._jobs = {job.id: job for job in found}

    async def start(
        self, id: str, request: dict[str, Any], total: int, work: Work, owner: str = ""
    ) -> Job:
        """Start a job.

        Args:
            id: that of the job.
            request: kept in the record.
            total: number of items of the work.
            work: runs the job and returns its result.
            owner: whose it is.

        Raises:
            InvalidField: this server runs no jobs at all.
            TooManyJobs: `max_running` jobs are running.
        """
        if self.max_running == 0:
            message = "background: this server runs no background jobs (CRMA_MAX_ABLATION_JOBS=0)"
            raise InvalidField(message, field="background", value=True, allowed=False)
        num_running = len(self._tasks)
        if num_running >= self.max_running:
            message = f"{num_running} jobs are already running"
            raise TooManyJobs(message, allowed=f"<= {self.max_running} at once")
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        job = Job(id, created, request, {"done": 0, "total": total}, owner=owner)
        self._jobs[id] = job
        self._tasks[id] = asyncio.create_task(self._run(job, work))
        await self._remove_oldest()
        return job

    def get(self, id: str) -> Job:
        """Return a job. Raises NotFound."""
        if id not in self._jobs:
            raise no_job(id)
        return self._jobs[id]

    def result(self, job: Job) -> Any:
        """Read a job's result; None unless it is done. Raises NotFound if it was just removed."""
        if job.status != "done":
            return None
        try:
            record = json.loads(self._path(job.id).read_bytes())
        except FileNotFoundError:
            raise no_job(job.id) from None
        return record["result"]

    async def cancel(self, job: Job) -> None:
        """Cancel a job if it is still running, and wait until it has ended."""
        task = self._tasks.get(job.id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def watch(self, job: Job) -> AsyncIterator[Job]:
        """Yield a job now and whenever it makes progress, until it has ended."""
        shown = None
        while True:
            changed = self._changed
            is_running = job.id in self._tasks
            state = (job.progress["done"], is_running)
            if state != shown:
                yield job
                shown = state
            # The consumer may have taken a while: look again before waiting.
            if job.id not in self._tasks:
                return
            await changed.wait()

    async def stop(self) -> None:
        """Interrupt all running jobs, and wait until they have ended."""
        self._stopping = True
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _remove_oldest(self) -> None:
        """Remove the records over the limit, of jobs that have ended."""
        num_over = max(0, len(self._jobs) - self.max_kept)
        ended = [id for id in self._jobs if id not in self._tasks]
        for id in ended[:num_over]:
            del self._jobs[id]
            await asyncio.to_thread(self._path(id).unlink, missing_ok=True)

    async def _run(self, job: Job, work: Work) -> None:
        def count() -> None:
            job.progress["done"] += 1
            self._notify()

        result = None
        status: Status = "failed"
        try:
            await _finish_write(self._write, job, None)
            result = await work(count)
            status = "done"
        except asyncio.CancelledError:
            status = "interrupted" if self._stopping else "cancelled"
        except CrmaError as error:
            job.error = error.message
        except Exception:
            log.exception("job %s failed", job.id)
            job.error = "the server failed; its log has the reason"
        try:
            await _finish_write(self._write, replace(job, status=status), result)
        except OSError as error:
            log.error("the result of job %s cannot be written: %s", job.id, error)
            status = "failed"
            job.error = "the result could not be written"
        finally:
            job.status = status  # only now can the result be read
            del self._tasks[job.id]
            self._notify()

    def _notify(self) -> None:
        """Wake everyone who watches a job."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _read(self, path: Path) -> Job:
        """Read a record; one that says "running" is interrupted, and rewritten to say so."""
        record = json.loads(path.read_bytes())
        del record["result"]
        job = Job(**record)
        if not _ID.fullmatch(job.id) or path.stem != job.id:
            raise ValueError(job.id)
        datetime.fromisoformat(job.created)
        if job.status == "running":
            job.status = "interrupted"
            self._write(job, None)
        return job

    def _write(self, job: Job, result: dict[str, Any] | None) -> None:
        with locked(self.folder):
            replace_file(
                self._path(job.id), to_json({**asdict(job), "result": result}), mode=PRIVATE
            )

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"


def no_job(id: str) -> NotFound:
    """The error for an id under which there is no job."""
    return NotFound(f"no job {id!r}", field="id", value=id, allowed="the id of a job that is kept")


async def _finish_write(write: Callable[..., None], *arguments: Any) -> None:
    """Run a write in a thread. If the caller is cancelled, the write still finishes.

    So no two writes of a job overlap, and a finished result is kept.
    """
    task = asyncio.create_task(asyncio.to_thread(write, *arguments))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
