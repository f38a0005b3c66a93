"""server.service.registry on a copy of a store that changes on another machine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from mirrored import ADDRESS, mirrored
from prometheus_client import CollectorRegistry
from published import BASE, SHAPE, WEIGHTS, publish
from scripted_engine import ScriptedEngine
from tiny import FORMAT, flip_bit

from crma.store.adapter_store import AdapterStore
from server.service.metrics import Metrics
from server.service.registry import Registry


@pytest.fixture
def writer(tmp_path: Path) -> AdapterStore:
    """A store that serves one task."""
    store = AdapterStore(tmp_path / "writer")
    publish(store, "task")
    return store


@pytest.fixture
async def registry(writer: AdapterStore, tmp_path: Path) -> AsyncIterator[Registry]:
    """A registry that watches a copy of it."""
    copy = mirrored(writer.root, tmp_path / "copy", list_every_s=0)
    metrics = Metrics(CollectorRegistry())
    made = Registry(
        copy, BASE, ScriptedEngine(), FORMAT, metrics, SHAPE, poll_s=0.002, copy_s=0.002
    )
    await made.start()
    yield made
    await made.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def shown(registry: Registry) -> tuple[float | None, float | None]:
    """The metrics: problems there are, and problems found."""
    value = registry.metrics.registry.get_sample_value
    return value("crma_store_problems"), value("crma_adapter_verification_failures_total")


async def test_what_is_published_on_another_machine_serves_without_a_restart(
    writer: AdapterStore, registry: Registry
) -> None:
    second = publish(writer, "task", 1).digest
    await until(lambda: registry.resolve("task", None).selection.task_digest == second)
    first = writer.task("task", "v1").digest
    writer.roll_back("tasks/task")
    await until(lambda: registry.resolve("task", None).selection.task_digest == first)


async def test_a_source_that_is_away_is_shown_and_what_served_goes_on(
    writer: AdapterStore, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = registry.resolve("task", None)
    with caplog.at_level(logging.INFO):
        away = writer.root.rename(tmp_path / "away")
        await until(lambda: registry.store_problem is not None)
        assert str(registry.store_problem).startswith(f"{ADDRESS}/channels.json cannot be read")
        asked = registry.store.mirror.source.asked
        num_looks = asked["file"]
        await until(lambda: asked["file"] > num_looks + 3)  # and all of them find the same
        assert registry.resolve("task", None) == before
        assert shown(registry) == (1, 1)
        away.rename(writer.root)
        await until(lambda: registry.store_problem is None)
    assert shown(registry) == (0, 1)
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


async def test_a_tampered_version_is_named_and_does_not_serve_until_it_is_mended(
    writer: AdapterStore, registry: Registry, tmp_path: Path
) -> None:
    before = registry.resolve("task", None)
    away = writer.root.rename(tmp_path / "away")  # nothing is copied meanwhile
    new = publish(AdapterStore(away), "task", 1)
    flip_bit(new.path / WEIGHTS)
    away.rename(writer.root)
    refused = f"{ADDRESS}/tasks/task/v2: {WEIGHTS}: not the file that was published."
    await until(lambda: registry.store_problem == refused)
    assert registry.resolve("task", None) == before
    assert registry.problems == {}
    flip_bit(writer.task("task").path / WEIGHTS)
    await until(lambda: registry.resolve("task", None).selection.task_digest == new.digest)
    await until(lambda: registry.store_problem is None)
