"""Background ablations: every one that was accepted must end, with the report of an idle server."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from soak.caller import Caller
from soak.expected import Expected, outcome
from soak.tally import MAX_SHOWN

MAX_OPEN = 2
ENDED = {"done", "failed", "cancelled", "interrupted"}
GET = frozenset({"200"})


@dataclass
class AcceptedJob:
    """A job whose id was received.

    Attributes:
        num_done: items that were once reported as done: never fewer afterwards.
        is_unwanted: it is cancelled once its first item is done.
        may_be_cancelled: its cancellation was sent; whether it came in time is not known.
    """

    id: str
    is_unwanted: bool = False
    num_done: int = 0
    may_be_cancelled: bool = False


@dataclass(eq=False)
class JobOwner:
    """Starts jobs with one key and follows them.

    Attributes:
        open: accepted jobs that have not been seen to end.
        num_accepted, num_done, num_cancelled, num_resumed: jobs; the last were open at a kill.
        lost: a line for each job that is gone, failed, went back, or has another report.
    """

    caller: Caller
    expected: Expected
    open: dict[str, AcceptedJob] = field(default_factory=dict)
    num_accepted: int = 0
    num_done: int = 0
    num_cancelled: int = 0
    num_resumed: int = 0
    lost: list[str] = field(default_factory=list)

    def start_or_follow(self) -> None:
        """Start a job if few are open, and look at all that are."""
        if len(self.open) < MAX_OPEN:
            self._start()
        self.follow()
        self.caller.gate.pause(1.0)

    def follow(self) -> None:
        """Look at every open job."""
        for job in list(self.open.values()):
            self._look(job)

    def note_kill(self) -> None:
        """The server was killed: what is open has to be resumed."""
        self.num_resumed += len(self.open)

    def wait_until_ended(self, patience_s: float) -> None:
        """Follow the open jobs until none is left; those that do not end in time are lost."""
        until = time.monotonic() + patience_s
        while self.open and time.monotonic() < until:
            self.follow()
            time.sleep(0.5)
        self.lost += [f"job {id} has not ended" for id in self.open]

    def _start(self) -> None:
        body = self.expected.ablation(background=True)
        may = frozenset({"202"})
        response = self.caller.send("start ablation", "POST", "/ablation", may, json=body)
        if response is not None and response.status_code == 202:
            id = response.json()["id"]
            self.open[id] = AcceptedJob(id, is_unwanted=self.num_accepted % 5 == 4)
            self.num_accepted += 1

    def _cancel(self, job: AcceptedJob) -> None:
        job.may_be_cancelled = True
        self.caller.send("cancel ablation", "DELETE", f"/ablation/{job.id}", GET)

    def _look(self, job: AcceptedJob) -> None:
        may = GET | {"404 not_found"}  # which is a lost record, below
        response = self.caller.send("read ablation", "GET", f"/ablation/{job.id}", may)
        if response is None:
            return
        if response.status_code != 200:
            self._lose(job, response.text)
            return
        record = response.json()
        num_done = record["progress"]["done"]
        if num_done < job.num_done:
            self._lose(job, f"had {job.num_done} items, has {num_done}")
            return
        job.num_done = num_done
        if record["status"] == "cancelled" and job.may_be_cancelled:
            self.num_cancelled += 1
            del self.open[job.id]
        elif record["status"] == "done":
            report = record["result"]
            if outcome(report) != self.expected.reports.get(report["provenance"]["crma"]):
                self._lose(job, f"has another report: {report['variants']}")
                return
            self.num_done += 1
            del self.open[job.id]
        elif record["status"] in ENDED:
            self._lose(job, f"{record['status']}: {record['error']}")
        elif job.is_unwanted and num_done:
            self._cancel(job)

    def _lose(self, job: AcceptedJob, reason: str) -> None:
        self.lost.append(f"job {job.id} of {self.caller.name}: {reason[:500]}")
        del self.open[job.id]


def report_of(owners: Sequence[JobOwner]) -> dict[str, Any]:
    """What became of the jobs of all owners."""
    lost = [line for owner in owners for line in owner.lost]
    counts = {
        name: sum(getattr(owner, f"num_{name}") for owner in owners)
        for name in ("accepted", "done", "cancelled", "resumed")
    }
    return {"jobs": counts, "num_lost_jobs": len(lost), "lost_jobs": lost[:MAX_SHOWN]}
