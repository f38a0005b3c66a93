"""The rows of background jobs. Every function is one transaction or a part of one (`Database.run`).

A server that runs a job holds its lease: a name that no other claim has, and a time. It renews it
while it runs. Whatever it writes about the job names the lease, and is refused once the lease has
passed to another: so two servers never mix their outcomes, however late one of them wakes up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    delete,
    func,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import Update

from server.records.clock import now_s
from server.records.name import has_name
from server.records.tables import jobs, outcomes

Status = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
MAX_ATTEMPTS = 5
_WAITS = jobs.c.status == "queued"
_RUNS = jobs.c.status == "running"
_HAS_ENDED = jobs.c.status.not_in(("queued", "running"))


@dataclass(frozen=True)
class Job:
    """A job as it was when it was read.

    Args:
        id: names it.
        owner: whose job it is; only they see it.
        base: what a server needs to be able to run it.
        created: UTC, ISO 8601, with six digits after the second.
        request: as its client sees it; empty in a list.
        spec: from which a server runs it; empty in a list.
        num_items: of the work.
        num_done: items that are finished.
        status: "interrupted" only if an older release said so.
        error: why it failed.
        num_attempts: claims since the last item was finished.
        settings: what a list says of the request; empty for jobs of an older release.
    """

    id: str
    owner: str
    base: str
    created: str
    request: Mapping[str, Any]
    spec: Mapping[str, Any]
    num_items: int
    num_done: int = 0
    status: Status = "queued"
    error: str | None = None
    num_attempts: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether it will never change again."""
        return self.status not in ("queued", "running")


_COLUMNS = [jobs.c[name] for name in Job.__dataclass_fields__]
_LISTED = [column for column in _COLUMNS if column.name not in ("request", "spec")]
"""Both may be megabytes, and a list may have a thousand jobs."""


def add(connection: Connection, job: Job, result: str | None = None) -> None:
    """Add a job, whose id must be new. `result` is its JSON, if it has ended already."""
    values: dict[str, Any] = {column.name: getattr(job, column.name) for column in _COLUMNS}
    values["result"] = result
    if job.has_ended:
        values["ended"] = now_s()
    connection.execute(insert(jobs).values(values))


def num_waiting(connection: Connection, owner: str) -> int:
    """How many jobs of an owner wait to be run."""
    query = select(func.count()).select_from(jobs).where(_WAITS, jobs.c.owner == owner)
    return connection.execute(query).scalar_one()


def find(connection: Connection, id: str, owner: str | None) -> Job | None:
    """An owner's job; None if there is none, or it is another's. Owner None: anyone's."""
    row = connection.execute(select(*_COLUMNS).where(_is(id, owner))).one_or_none()
    return None if row is None else _job(row)


def find_listed(connection: Connection, id: str, owner: str | None) -> Job | None:
    """As `find`, without its request and spec."""
    row = connection.execute(select(*_LISTED).where(_is(id, owner))).one_or_none()
    return None if row is None else _job(row)


def result_of(connection: Connection, id: str) -> str | None:
    """The result of a job, as JSON; None unless it is done."""
    return connection.execute(select(jobs.c.result).where(jobs.c.id == id)).scalar_one_or_none()


def newest(connection: Connection, owner: str | None, limit: int) -> list[Job]:
    """The jobs of an owner, or of everyone, the newest first, without requests and specs."""
    query = select(*_LISTED).where(_owned_by(owner))
    ordered = query.order_by(jobs.c.created.desc(), jobs.c.id).limit(limit)
    return [_job(row) for row in connection.execute(ordered)]


def claim(connection: Connection, base: str, lease: str, lease_s: float) -> Job | None:
    """Take the next job that waits, or whose lease has ended.

    The owner with the fewest running jobs comes first, then the oldest job.

    Args:
        base: only jobs that need this.
        lease: a name that no other claim has.
        lease_s: seconds until it ends, unless it is renewed.

    Returns:
        The job, which is "running" from now on; None if there is none to run.
    """
    other = jobs.alias()
    num_running = (
        select(func.count())
        .select_from(other)
        .where(other.c.owner == jobs.c.owner, other.c.status == "running")
        .scalar_subquery()
    )
    is_free = or_(_WAITS, _RUNS & (jobs.c.leased_until < now_s()))
    query = select(jobs.c.id).where(jobs.c.base == base, is_free)
    ordered = query.order_by(num_running, jobs.c.created, jobs.c.id).limit(1)
    id = connection.execute(ordered.with_for_update(of=jobs, skip_locked=True)).scalar()
    if id is None:
        return None
    taken = (
        update(jobs)
        .where(jobs.c.id == id)
        .values(
            status="running",
            lease=lease,
            leased_until=now_s() + lease_s,
            num_attempts=jobs.c.num_attempts + 1,
        )
    )
    return _job(connection.execute(taken.returning(*_COLUMNS)).one())


def outcomes_of(connection: Connection, id: str) -> dict[int, Any]:
    """The outcomes of the items of a job that are finished, by position."""
    query = select(outcomes.c.position, outcomes.c.outcome).where(outcomes.c.job == id)
    return {row.position: row.outcome for row in connection.execute(query)}


def keep_outcome(
    connection: Connection, id: str, lease: str, lease_s: float, position: int, outcome: Any
) -> bool:
    """Record a finished item, and renew the lease. False: the lease has passed to another."""
    renewed = _held(id, lease).values(num_attempts=0, leased_until=now_s() + lease_s)
    if not connection.execute(renewed).rowcount:
        return False
    is_this = (outcomes.c.job == id) & (outcomes.c.position == position)
    if connection.execute(select(outcomes.c.position).where(is_this)).first():
        return True  # a commit whose answer was lost
    connection.execute(update(jobs).where(jobs.c.id == id).values(num_done=jobs.c.num_done + 1))
    row = {"job": id, "position": position, "outcome": outcome}
    connection.execute(insert(outcomes).values(row))
    return True


def renew(connection: Connection, leases: Mapping[str, str], lease_s: float) -> set[str]:
    """Renew leases. Returns the ids of the jobs that are still held.

    Args:
        leases: by job.
        lease_s: seconds from now.
    """
    held = set()
    for id, lease in leases.items():
        renewed = _held(id, lease).values(leased_until=now_s() + lease_s)
        if connection.execute(renewed).rowcount:
            held.add(id)
    return held


def finish(
    connection: Connection,
    id: str,
    lease: str,
    status: Status,
    error: str | None = None,
    result: str | None = None,
) -> bool:
    """Record how a job ended. False: the lease has passed to another, or it was cancelled."""
    ended = _held(id, lease).values(
        status=status, error=error, result=result, ended=now_s(), lease=None, leased_until=None
    )
    if not connection.execute(ended).rowcount:
        return False
    connection.execute(delete(outcomes).where(outcomes.c.job == id))
    return True


def release(connection: Connection, leases: Mapping[str, str], *, is_orderly: bool) -> None:
    """Give jobs back, so that any server can go on with them at once.

    Args:
        leases: by job.
        is_orderly: they did not end this server, and this was no attempt.
    """
    values = {"status": "queued", "lease": None, "leased_until": None}
    for id, lease in leases.items():
        num_attempts = jobs.c.num_attempts - int(is_orderly)
        connection.execute(_held(id, lease).values(values).values(num_attempts=num_attempts))


def cancel(connection: Connection, id: str, owner: str | None) -> Job | None:
    """Cancel an owner's job unless it has ended. Returns it; None if there is none."""
    ended = update(jobs).where(_is(id, owner), or_(_WAITS, _RUNS))
    values = {"status": "cancelled", "ended": now_s(), "lease": None, "leased_until": None}
    if connection.execute(ended.values(values)).rowcount:
        connection.execute(delete(outcomes).where(outcomes.c.job == id))
    return find(connection, id, owner)


def expire(connection: Connection, before: str, error: str) -> None:
    """Fail the jobs that no server runs and that were created before a time."""
    is_left = or_(_WAITS, _RUNS & (jobs.c.leased_until < now_s()))
    values = {"status": "failed", "error": error, "ended": now_s(), "lease": None}
    old = select(jobs.c.id).where(is_left, jobs.c.created < before)
    expired = connection.execute(old.with_for_update(skip_locked=True)).scalars().all()
    connection.execute(update(jobs).where(jobs.c.id.in_(expired)).values(values))
    connection.execute(delete(outcomes).where(outcomes.c.job.in_(expired)))


def remove_old(connection: Connection, max_kept: int, kept_s: float) -> None:
    """Remove jobs that ended too long ago, and the oldest of an owner who has too many.

    Args:
        max_kept: jobs of one owner, those that have not ended too.
        kept_s: seconds since the end.
    """
    connection.execute(delete(jobs).where(_HAS_ENDED, jobs.c.ended < now_s() - kept_s))
    latest_first = func.row_number().over(
        partition_by=jobs.c.owner, order_by=(_HAS_ENDED, jobs.c.created.desc(), jobs.c.id)
    )
    ranked = select(jobs.c.id, latest_first.label("place")).subquery()
    too_many = select(ranked.c.id).where(ranked.c.place > max_kept)
    connection.execute(delete(jobs).where(_HAS_ENDED, jobs.c.id.in_(too_many)))


def _is(id: str, owner: str | None) -> ColumnElement[bool]:
    return has_name(jobs.c.id, id) & _owned_by(owner)


def _owned_by(owner: str | None) -> ColumnElement[bool]:
    return true() if owner is None else jobs.c.owner == owner


def _held(id: str, lease: str) -> Update:
    """A change of a job that the holder of its lease makes."""
    return update(jobs).where(jobs.c.id == id, jobs.c.lease == lease, _RUNS)


def _job(row: Row[Any]) -> Job:
    return Job(**{"request": {}, "spec": {}, **row._mapping})
