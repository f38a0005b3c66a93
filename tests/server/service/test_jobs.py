"""server.service.jobs and job_runner: several servers, one database, and each item once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection, event, update

from crma.core.errors import ConfigError, NotFound
from server.engine.errors import EngineStopped
from server.records import jobs as rows
from server.records.database import Database
from server.records.tables import jobs as table
from server.service.errors import TooManyJobs
from server.service.job_runner import JobLimits, JobRunner, RunningJob, Work
from server.service.jobs import Jobs

LIMITS = JobLimits(max_running=1, max_waiting=3, max_kept=100, kept_s=1e6)
Open = Callable[[], Database]
Started = Callable[..., Jobs]


class Items:
    """The work of the tests: `num_items` items, each of which ends once it is let go.

    ran: (server, job, item) of every item that was run.
    """

    def __init__(self, num_items: int = 3) -> None:
        self.num_items = num_items
        self.go = asyncio.Event()
        self.ran: list[tuple[str, str, int]] = []
        self.begun = asyncio.Event()

    def on(self, server: str) -> Work:
        async def work(running: RunningJob) -> dict[str, Any]:
            outcomes = dict(running.outcomes)
            for item in range(self.num_items):
                if item in outcomes:
                    continue
                self.ran.append((server, running.job.id, item))
                outcomes[item] = f"outcome {item}"
                await running.keep(item, outcomes[item])
                self.begun.set()
                await self.go.wait()
            return {"outcomes": [outcomes[item] for item in range(self.num_items)]}

        return work


@pytest.fixture
async def start_server(open_database: Open) -> AsyncIterator[Started]:
    """Starts one more server on the test's own database; stops all at the end."""
    servers: list[Jobs] = []

    def start(work: Work, limits: JobLimits = LIMITS, **options: Any) -> Jobs:
        options = {"poll_s": 0.005, **options}
        runner = JobRunner(open_database(), "base", work, lambda: True, limits, **options)
        runner.start()
        servers.append(Jobs(runner))
        return servers[-1]

    yield start
    for server in servers:
        await server.runner.stop()


async def test_a_list_and_a_watcher_read_no_requests(start_server: Started) -> None:
    """A hundred jobs of a megabyte each were read for a list, and one for each change of a job."""
    items = Items()
    jobs = start_server(items.on("one"))
    await jobs.start("job", "a", {"large": "x"}, {"large": "x"}, 3)
    await items.begun.wait()
    listed = await jobs.newest("a")
    assert [(job.id, job.request, job.spec) for job in listed] == [("job", {}, {})]
    assert (await jobs.get("job", "a")).spec == {}
    items.go.set()
    await ended(jobs, "job", "a")
    job, _ = await jobs.get_with_result("job", "a")
    assert job.request == {"large": "x"}


async def ended(jobs: Jobs, id: str, owner: str = "") -> rows.Job:
    """A job once it has ended."""
    async with asyncio.timeout(30):
        async for job in jobs.watch(id, owner):
            last = job
    return last


async def add(jobs: Jobs, id: str, owner: str = "") -> None:
    await jobs.start(id, owner, {"asked": id}, {}, 3)


async def result(jobs: Jobs, id: str) -> str | None:
    return (await jobs.get_with_result(id, ""))[1]


async def crash(jobs: Jobs) -> None:
    """End a server as kill -9 does: it gives nothing back."""
    runner = jobs.runner
    tasks = [runner._loop, *(task for _, task in runner._running.values())]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_killed_servers_job_goes_on_elsewhere_after_the_finished_items(
    start_server: Started,
) -> None:
    """A restart used to call it interrupted, and all its items were lost."""
    items = Items()
    first = start_server(items.on("first"), lease_s=0.0)
    await add(first, "job")
    await items.begun.wait()
    await crash(first)
    items.go.set()
    second = start_server(items.on("second"))
    job = await ended(second, "job")
    assert (job.status, job.num_done) == ("done", 3)
    assert items.ran == [("first", "job", 0), ("second", "job", 1), ("second", "job", 2)]
    assert await result(second, "job") == '{"outcomes": ["outcome 0", "outcome 1", "outcome 2"]}'


async def test_a_second_server_neither_takes_nor_changes_a_live_job(start_server: Started) -> None:
    """A server that then failed on a used port overwrote the live one's record."""
    items = Items()
    first = start_server(items.on("first"))
    await add(first, "job")
    await items.begun.wait()
    second = start_server(items.on("second"))
    for _ in range(3):
        await second.runner._look(is_cleaning=True)
    await second.runner.stop()
    assert (await first.get("job", "")).status == "running"
    items.go.set()
    assert (await ended(first, "job")).status == "done"
    assert {server for server, _, _ in items.ran} == {"first"}


async def test_a_stopped_server_gives_its_job_to_the_next_at_once(start_server: Started) -> None:
    items = Items()
    first = start_server(items.on("first"))
    await add(first, "job")
    await items.begun.wait()
    await first.runner.stop()
    assert (await first.get("job", "")).status == "queued"
    items.go.set()
    second = start_server(items.on("second"))
    assert (await ended(second, "job")).status == "done"
    assert [item for _, _, item in items.ran] == [0, 1, 2]


async def test_a_server_that_wakes_up_late_writes_nothing_into_the_job_of_another(
    start_server: Started,
) -> None:
    late, other = Items(), Items()
    other.go.set()
    first = start_server(late.on("first"), lease_s=0.0, poll_s=60.0)
    await add(first, "job")
    await late.begun.wait()
    second = start_server(other.on("second"))
    assert (await ended(second, "job")).status == "done"
    late.go.set()
    async with asyncio.timeout(30):
        while first.runner._running:
            await first.runner.change(first.runner.num_changes)
    job = await second.get("job", "")
    assert (job.status, job.num_done) == ("done", 3)


async def test_many_jobs_on_two_servers_run_once_each(start_server: Started) -> None:
    items = Items()
    items.go.set()
    limits = JobLimits(2, 100, 100, 1e6)
    servers = [start_server(items.on(name), limits) for name in ("first", "second")]
    ids = [f"job-{number}" for number in range(20)]
    await asyncio.gather(*(add(servers[0], id) for id in ids))
    for id in ids:
        assert (await ended(servers[1], id)).status == "done"
    assert sorted((id, item) for _, id, item in items.ran) == sorted(
        (id, item) for id in ids for item in range(3)
    )


async def test_a_job_is_cancelled_from_any_server(start_server: Started) -> None:
    items = Items()
    first = start_server(items.on("first"))
    second = start_server(items.on("second"), JobLimits(1, 3, 100, 1e6), poll_s=60.0)
    await add(first, "job")
    await items.begun.wait()
    assert (await second.cancel("job", "")).status == "cancelled"
    async with asyncio.timeout(30):
        while first.runner._running or second.runner._running:
            await asyncio.sleep(0.001)
    assert (await second.cancel("job", "")).status == "cancelled"
    assert await result(first, "job") is None


async def test_jobs_wait_for_room_and_the_owner_with_fewest_running_is_next(
    start_server: Started,
) -> None:
    items = Items()
    jobs = start_server(items.on("server"), JobLimits(1, 3, 100, 1e6))
    await add(jobs, "a1", "a")
    await items.begun.wait()
    for id in ("a2", "a3", "a4"):
        await add(jobs, id, "a")
    with pytest.raises(TooManyJobs):
        await add(jobs, "a5", "a")
    await add(jobs, "b1", "b")
    assert {job.id: job.status for job in await jobs.newest("a")} == {
        "a1": "running",
        "a2": "queued",
        "a3": "queued",
        "a4": "queued",
    }
    items.go.set()
    await ended(jobs, "a4", "a")
    await ended(jobs, "b1", "b")
    order = list(dict.fromkeys(id for _, id, _ in items.ran))
    assert [id for id in order if id.startswith("a")] == ["a1", "a2", "a3", "a4"]


async def test_a_busy_owners_next_job_comes_after_anothers_first(start_server: Started) -> None:
    items = Items()
    jobs = start_server(items.on("first"))
    await add(jobs, "a1", "a")
    await items.begun.wait()
    for id, owner in (("a2", "a"), ("b1", "b")):
        await add(jobs, id, owner)
    start_server(items.on("second"))
    async with asyncio.timeout(30):
        while len(items.ran) < 2:
            await asyncio.sleep(0.001)
    assert [id for _, id, _ in items.ran] == ["a1", "b1"]
    items.go.set()
    await ended(jobs, "a2", "a")


async def test_a_job_of_another_owner_is_like_one_that_does_not_exist(
    start_server: Started,
) -> None:
    items = Items()
    jobs = start_server(items.on("server"))
    await add(jobs, "job", "a")
    await items.begun.wait()
    for owner in ("b", ""):
        for ask in (jobs.get, jobs.get_with_result, jobs.cancel):
            with pytest.raises(NotFound):
                await ask("job", owner)
        with pytest.raises(NotFound):
            await anext(jobs.watch("job", owner))
        assert await jobs.newest(owner) == []
    assert (await jobs.get("job", "a")).status == "running"


async def test_old_jobs_are_removed_and_those_that_nobody_can_run_expire(
    start_server: Started,
) -> None:
    items = Items()
    items.go.set()
    jobs = start_server(items.on("server"), JobLimits(1, 9, 2, 1e6))
    for id in ("j1", "j2", "j3"):
        await add(jobs, id, "a")
        await ended(jobs, id, "a")
    await add(jobs, "other", "b")
    await ended(jobs, "other", "b")
    assert [job.id for job in await jobs.newest("a")] == ["j3", "j2"]
    database = jobs.runner.database
    created = datetime.now(UTC).isoformat(timespec="microseconds")
    await database.run(rows.add, rows.Job("foreign", "a", "another", created, {}, {}, 1))
    jobs.runner.limits = JobLimits(1, 9, 9, 0.0)
    await jobs.runner._look(is_cleaning=True)
    left = await jobs.newest("a")
    assert [(job.id, job.status) for job in left] in ([("foreign", "failed")], [])


async def test_a_job_that_ends_every_server_is_not_tried_for_ever(start_server: Started) -> None:
    async def work(running: RunningJob) -> dict[str, Any]:
        raise EngineStopped("the engine has failed")

    jobs = start_server(work)
    await add(jobs, "job")
    job = await ended(jobs, "job")
    assert job.status == "failed"
    assert "ended 5 times" in str(job.error)


async def test_a_failure_is_recorded_with_its_reason(start_server: Started) -> None:
    reasons = [ConfigError("no such scorer"), KeyError("secret")]

    async def work(running: RunningJob) -> dict[str, Any]:
        raise reasons.pop(0)

    jobs = start_server(work)
    await add(jobs, "wrong")
    job = await ended(jobs, "wrong")
    assert (job.status, job.error) == ("failed", "no such scorer")
    await add(jobs, "fault")
    assert "secret" not in str((await ended(jobs, "fault")).error)


async def test_an_outcome_whose_answer_was_lost_is_counted_once(open_database: Open) -> None:
    database = open_database()
    created = datetime.now(UTC).isoformat(timespec="microseconds")
    await database.run(rows.add, rows.Job("job", "", "base", created, {}, {}, 1))
    await database.run(rows.claim, "base", "lease", 60.0)
    for _ in range(2):
        assert await database.run(rows.keep_outcome, "job", "lease", 60.0, 0, "outcome")
    job = await database.run(rows.find, "job", "")
    assert job is not None
    assert job.num_done == 1


async def test_a_lost_lease_refuses_everything(open_database: Open) -> None:
    database = open_database()
    created = datetime.now(UTC).isoformat(timespec="microseconds")
    await database.run(rows.add, rows.Job("job", "", "base", created, {}, {}, 1))
    await database.run(rows.claim, "base", "old", 0.0)
    await database.run(rows.claim, "base", "new", 60.0)
    assert not await database.run(rows.keep_outcome, "job", "old", 60.0, 0, "outcome")
    assert not await database.run(rows.finish, "job", "old", "done")
    assert await database.run(rows.renew, {"job": "old"}, 60.0) == set()
    await database.run(rows.release, {"job": "old"}, is_orderly=True)
    job = await database.run(rows.find, "job", "")
    assert job is not None
    assert (job.status, job.num_done) == ("running", 0)


async def test_a_job_waits_while_the_database_does_not_answer(
    start_server: Started, open_database: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = open_database()  # it waits for the job's own writes: only what is made below gives up
    monkeypatch.setattr("server.records.database._BUSY_S", 0.5)
    monkeypatch.setitem(
        __import__("server.records.database", fromlist=["_POSTGRESQL"])._POSTGRESQL,
        "options",
        "-c lock_timeout=500ms",
    )
    items = Items()
    jobs = start_server(items.on("server"))
    await add(jobs, "job")
    await items.begun.wait()
    locked, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(connection: Connection) -> None:
        connection.execute(update(table).values(owner=""))
        loop.call_soon_threadsafe(locked.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(30)

    holding = asyncio.create_task(holder.run(hold))
    await locked.wait()
    items.go.set()
    async with asyncio.timeout(30):
        while jobs.runner._problem is None:
            await asyncio.sleep(0.001)
    assert len(items.ran) == 2
    go.set()
    await holding
    assert (await ended(jobs, "job")).status == "done"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_job_on_a_full_disk_fails_with_that_reason_and_the_server_goes_on(
    start_server: Started,
) -> None:
    """Only the log had the reason, and the record on disk said "running" for ever."""
    room = [2**30]

    async def work(running: RunningJob) -> dict[str, Any]:
        room[0] = 1  # SQLite raises it to the present size
        await running.keep(0, "x" * 2**20)
        return {}

    jobs = start_server(work)
    engine = jobs.runner.database._engine
    event.listen(engine, "begin", lambda it: it.exec_driver_sql(f"pragma max_page_count={room[0]}"))
    await add(jobs, "job")
    job = await ended(jobs, "job")
    assert job.status == "failed"
    assert "disk is full" in str(job.error)
    room[0] = 2**30
    items = Items()
    items.go.set()
    jobs.runner.work = items.on("server")
    await add(jobs, "next")
    assert (await ended(jobs, "next")).status == "done"
    assert (await jobs.get("job", "")).status == "failed"
