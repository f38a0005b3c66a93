"""server.service.jobs: what the routes' tests cannot time (tests/server/http/test_jobs.py)."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crma.core.files import locked
from server.service import jobs
from server.service.jobs import Count, Jobs

ID = "abl-" + "0" * 32


async def test_the_last_record_of_a_job_is_not_written_before_its_first_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    begun = [threading.Event(), threading.Event()]
    writes = iter(begun)

    @contextmanager
    def wait_and_lock(folder: Path) -> Iterator[None]:
        next(writes).set()
        assert go.wait(10)
        with locked(folder):
            yield

    async def work(count: Count) -> dict[str, Any]:
        raise AssertionError("a job that was cancelled began")

    monkeypatch.setattr(jobs, "locked", wait_and_lock)
    kept = Jobs(tmp_path, max_running=1, max_kept=1)
    job = await kept.start(ID, {}, 1, work)
    assert await asyncio.to_thread(begun[0].wait, 10)
    cancelling = asyncio.create_task(kept.cancel(job))
    for _ in range(5):  # threads start in order: a second write would have begun by then
        await asyncio.to_thread(int)
    assert not begun[1].is_set()
    go.set()
    await asyncio.wait_for(cancelling, 10)
    assert json.loads((tmp_path / f"{ID}.json").read_bytes())["status"] == "cancelled"
