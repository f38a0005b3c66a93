"""server.service.store_watch: a store that is damaged, gone, or hangs, and comes back."""

import asyncio
import errno
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from paths import ROOT
from prometheus_client import CollectorRegistry
from published import BASE, SHAPE, publish
from scripted_engine import ScriptedEngine
from signing_keys import make_keys
from tiny import FORMAT

from crma.store.adapter_store import AdapterStore
from crma.store.signing import sign_versions
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.service.store_view import StoreView


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """A store that serves one task."""
    made = AdapterStore(tmp_path / "store")
    publish(made, "task")
    return made


def registry(store: AdapterStore, **options: float) -> Registry:
    return Registry(
        store, BASE, ScriptedEngine(), FORMAT, Metrics(CollectorRegistry()), SHAPE, **options
    )


async def started(store: AdapterStore) -> Registry:
    """A registry that has read its store and no longer watches it."""
    made = registry(store)
    await made.start()
    await made.stop()
    return made


def shown(registry: Registry) -> tuple[float | None, float | None]:
    """The metrics: problems there are, and problems found."""
    value = registry.metrics.registry.get_sample_value
    return value("crma_store_problems"), value("crma_adapter_verification_failures_total")


def delete_channels(root: Path) -> None:
    (root / "channels.json").unlink()


def damage_channels(root: Path) -> None:
    (root / "channels.json").write_text("{")


def make_channels_a_pipe(root: Path) -> None:
    (root / "channels.json").unlink()
    os.mkfifo(root / "channels.json")


def make_channels_a_folder(root: Path) -> None:
    (root / "channels.json").unlink()
    (root / "channels.json").mkdir()


def empty_channels(root: Path) -> None:
    (root / "channels.json").write_bytes(b"")


@pytest.mark.parametrize(
    "harm",
    [
        delete_channels,
        damage_channels,
        make_channels_a_pipe,
        make_channels_a_folder,
        empty_channels,
        shutil.rmtree,
        lambda root: (shutil.rmtree(root), root.write_text("")),
    ],
)
async def test_what_served_goes_on_serving_while_the_store_cannot_be_read(
    store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: object
) -> None:
    """Without channels.json every task was a 404, and /readyz said that all was well."""
    made = await started(store)
    shutil.copytree(store.root, tmp_path / "copy")
    before = made.resolve("task", None)
    assert callable(harm)
    harm(store.root)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            await made.refresh()
    assert made.resolve("task", None) == before
    assert made.store_problem is not None
    assert shown(made) == (1, 1)
    assert len(caplog.records) == 1
    if store.root.is_dir():
        shutil.rmtree(store.root)
    else:
        store.root.unlink(missing_ok=True)
    shutil.copytree(tmp_path / "copy", store.root)
    await made.refresh()
    assert made.store_problem is None
    assert shown(made) == (0, 1)
    assert made.resolve("task", None) == before


async def test_a_store_that_could_not_be_read_once_is_read_again(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked as it had when it could not be read, so it was never read again."""
    made = await started(store)
    publish(store, "another", 1)
    read = made._reader.read

    def fail() -> StoreView:
        raise OSError(errno.EMFILE, "Too many open files", "channels.json")

    monkeypatch.setattr(made._reader, "read", fail)
    await made.refresh()
    assert made.store_problem == "cannot be read: Too many open files: channels.json"
    monkeypatch.setattr(made._reader, "read", read)
    await made.refresh()
    assert made.store_problem is None
    assert made.task_names == ["another", "task"]


async def test_a_key_for_signatures_that_has_gone_is_a_problem_of_the_store(
    store: AdapterStore, tmp_path: Path
) -> None:
    """It was a traceback in the log every two seconds, and nowhere else."""
    keys = make_keys(tmp_path, "own")
    sign_versions(store, keys.private)
    made = await started(AdapterStore(store.root, keys.public))
    before = made.resolve("task", None)
    key = keys.public.read_bytes()
    keys.public.unlink()
    publish(store, "task", 1)
    sign_versions(store, keys.private)
    await made.refresh()
    assert made.store_problem is not None
    assert "own.pub cannot be used" in made.store_problem
    assert made.resolve("task", None) == before
    keys.public.write_bytes(key)
    await made.refresh()
    assert made.store_problem is None
    assert made.resolve("task", None).selection != before.selection


async def test_a_store_that_was_empty_at_the_start_is_no_problem(tmp_path: Path) -> None:
    made = await started(AdapterStore(tmp_path / "store"))
    assert (made.store_problem, made.task_names) == (None, [])


class HangingStore(AdapterStore):
    """A store on a file system that does not answer until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self.asked = threading.Event()

    def task_versions(self, name: str) -> tuple[str, ...]:
        self.asked.set()
        self.go.wait()
        return super().task_versions(name)


async def test_a_store_that_does_not_answer_is_shown_until_it_does(store: AdapterStore) -> None:
    hanging = HangingStore(store.root)
    made = registry(hanging, poll_s=0.001, patience_s=0.001)
    starting = asyncio.create_task(made.start())
    async with asyncio.timeout(30):
        while made.store_problem is None:
            await asyncio.sleep(0.001)
    assert "has not answered" in made.store_problem
    assert not made.verified
    hanging.go.set()
    await starting
    assert made.store_problem is None
    assert made.resolve("task", None).task is not None
    await made.stop()


async def test_a_registry_that_stops_waits_for_a_look_that_ends(store: AdapterStore) -> None:
    """Python ended the thread inside torch, which aborted the process: exit code -6."""
    hanging = HangingStore(store.root)
    made = registry(hanging)
    starting = asyncio.create_task(made.start())
    async with asyncio.timeout(30):
        while not hanging.asked.is_set():
            await asyncio.sleep(0.001)
    starting.cancel()
    stopping = asyncio.create_task(made.stop())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not stopping.done()
    hanging.go.set()
    await asyncio.wait_for(stopping, 5)


@pytest.mark.e2e
def test_work_that_never_ends_does_not_keep_the_process() -> None:
    """asyncio and Python wait for their threads at the end: with one that hangs, for ever."""
    script = """
        import asyncio, threading
        from server.daemon_threads import DaemonThreads

        async def main():
            threads = DaemonThreads()
            looking = asyncio.create_task(threads.run(threading.Event().wait))
            await asyncio.sleep(0)
            looking.cancel()
            await threads.wait(0.001)

        asyncio.run(main())
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, cwd=ROOT, timeout=300, check=True)
