"""Background jobs over a real socket: their progress while they run, and how they are cancelled."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from crma_client import AsyncClient, Client, errors
from socket_server import socket_server

from crma.models.base_model import BaseModel

QUESTIONS = [
    {"id": f"q{i}", "task": "medical", "question": f"Question {i}?", "answers": ["x"]}
    for i in range(100)
]
LONG: dict[str, Any] = {"questions": QUESTIONS, "max_tokens": 100}


class Stopped(Exception):
    """What a caller's own function raises."""


def stop(done: int, total: int) -> None:
    if done:
        raise Stopped


@pytest.fixture(scope="module")
def address(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    store = tiny.filled_store(tmp_path_factory.mktemp("served") / "store", base)
    with socket_server(base, store.root) as address:
        yield address


def test_an_exception_of_the_caller_cancels_the_job(address: str) -> None:
    with Client(address, api_key="key") as client:
        with pytest.raises(Stopped):
            client.run_ablation(stop, **LONG)
        job = client.ablation_jobs()[0]
        assert job["status"] == "cancelled"
        assert 0 < job["progress"]["done"] < 2 * len(QUESTIONS)
        with pytest.raises(errors.JobFailed, check=lambda error: error.value == job["id"]):
            client.wait_for_ablation(job["id"])


async def test_an_exception_of_the_caller_cancels_the_job_of_the_async_client(
    address: str,
) -> None:
    async with AsyncClient(address, api_key="key") as client:
        with pytest.raises(Stopped):
            await client.run_ablation(stop, **LONG)
        jobs = await client.ablation_jobs()
    assert jobs[0]["status"] == "cancelled"


def test_progress_grows_until_all_is_done(address: str) -> None:
    seen: list[tuple[int, int]] = []
    with Client(address, api_key="key") as client:
        client.run_ablation(
            lambda *progress: seen.append(progress), questions=QUESTIONS[:8], max_tokens=4
        )
    assert seen == sorted(seen)
    assert seen[-1] == (16, 16)
