"""Work in the background: started, watched, cancelled, and kept on disk as one JSON file each.

A record is {"id", "status", "created", "request", "progress", "error", "result"}, written when the work starts and when
it ends. One that was running when the process ended is found "interrupted".
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
from crma.core.files import locked, replace_file, to_json
from server.service.errors import TooManyJobs

log = logging.getLogger("server")

Status = Literal["running", "done", "failed", "cancelled", "interrupted"]
Work = Callable[
    [Callable[[], None]], Awaitable[dict[str, Any]]
]  # given what to call after each item


@dataclass
class Job:
    """One of them. `progress`: items that are done, of how many. `error` says why it failed."""

    id: str
    created: str
    request: dict[str, Any]
    progress: dict[str, int]
    status: Status = "running"
    error: str | None = None


@dataclass(eq=False)
class Jobs:
    """Those in a folder, which is made when the first one starts. Ids are the server's own and looked up, never a path.

    Args:
        max_running: at once.
        max_kept: on disk; of those that have ended the first that began goes first.
    """

    folder: Path
    max_running: int
    max_kept: int
    _jobs: dict[str, Job] = field(default_factory=dict, init=False)  # the oldest first
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _moved: asyncio.Event = field(
        default_factory=asyncio.Event, init=False
    )  # is set, and replaced, when any job moves
    _stopping: bool = field(default=False, init=False)

    def load(self) -> None:
        """Reads the folder. A file that is none of its records is left alone."""
        for path in self.folder.glob("*.json"):
            try:
                record = json.loads(path.read_bytes())
                del record["result"]
                job = Job(**record)
                if not re.fullmatch(r"[a-z]+-[0-9a-f]{32}", job.id) or path.stem != job.id:
                    raise ValueError(job.id)
                datetime.fromisoformat(job.created)
                if job.status == "running":
                    job.status = "interrupted"
                    self._write(job, None)
            except (OSError, ValueError, KeyError, TypeError, RecursionError, CrmaError) as error:
                log.warning("no record of a job, or it cannot be written: %s: %s", path, error)
                continue
            self._jobs[job.id] = job
        self._jobs = dict(sorted(self._jobs.items(), key=lambda each: each[1].created))

    async def start(self, id: str, request: dict[str, Any], total: int, work: Work) -> Job:
        """Starts it. Raises TooManyJobs where `max_running` run already."""
        if len(self._tasks) >= self.max_running:
            raise TooManyJobs(
                f"{len(self._tasks)} jobs run already", allowed=f"<= {self.max_running} at once"
            )
        job = Job(
            id,
            datetime.now(UTC).isoformat(timespec="microseconds"),
            request,
            {"done": 0, "total": total},
        )
        self._jobs[id] = job
        self._tasks[id] = asyncio.create_task(self._run(job, work))
        ended = [each for each in self._jobs if each not in self._tasks]
        for each in ended[: max(0, len(self._jobs) - self.max_kept)]:
            del self._jobs[each]
            await asyncio.to_thread(self._path(each).unlink, missing_ok=True)
        return job

    def get(self, id: str) -> Job:
        """Raises NotFound."""
        if id not in self._jobs:
            raise NotFound(
                f"no job {id!r}", field="id", value=id, allowed="the id of a job that is kept"
            )
        return self._jobs[id]

    def result(self, job: Job) -> Any:
        """What it gave; None unless it is done."""
        try:
            return (
                json.loads(self._path(job.id).read_bytes())["result"]
                if job.status == "done"
                else None
            )
        except FileNotFoundError:  # it made room for another meanwhile
            raise NotFound(
                f"no job {job.id!r}", field="id", value=job.id, allowed="a job that is kept"
            ) from None

    async def cancel(self, job: Job) -> None:
        """Ends it where it runs still."""
        if task := self._tasks.get(job.id):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def changes(self, job: Job) -> AsyncIterator[Job]:
        """The job, and again when it has moved, until it has ended."""
        shown = None
        while True:
            moved, now = self._moved, (job.progress["done"], job.id in self._tasks)
            if now != shown:
                yield job
                shown = now
            if job.id not in self._tasks:
                return
            await moved.wait()

    async def stop(self) -> None:
        """Ends all that run: interrupted."""
        self._stopping = True
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, job: Job, work: Work) -> None:
        def count() -> None:
            job.progress["done"] += 1
            self._move()

        result = None
        status: Status = "failed"
        try:
            await _to_its_end(self._write, job, None)
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
            await _to_its_end(self._write, replace(job, status=status), result)
        except OSError as error:
            log.error("job %s: its result cannot be written: %s", job.id, error)
            status, job.error = "failed", "the result could not be written"
        finally:
            job.status = status  # not before the result is there to be read
            del self._tasks[job.id]
            self._move()

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _write(self, job: Job, result: dict[str, Any] | None) -> None:
        with locked(self.folder):
            replace_file(self._path(job.id), to_json({**asdict(job), "result": result}))

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"


async def _to_its_end(write: Callable[..., None], *arguments: Any) -> None:
    """In a thread. Who is cancelled meanwhile waits for it, so that no two writes overlap and what is done is kept."""
    task = asyncio.create_task(asyncio.to_thread(write, *arguments))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
