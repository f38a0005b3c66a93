"""Which adapters a request means, and a store that changes while it serves."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from published import BASE, SHAPES, publish, publish_backbone
from tiny import FORMAT, flip_bit, injection

from crma.core.errors import NotFound, StoreError
from crma.models.prompts import PromptFormat
from crma.store.adapter_store import AdapterStore
from server.engine.native.adapter_pool import AdapterPool
from server.service.metrics import Metrics
from server.service.registry import Registry

BASE_FORMAT = PromptFormat("<", ">", "!")


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def registry(store: AdapterStore, **options: Any) -> Registry:
    pool, metrics = AdapterPool(injection(), 4), Metrics(CollectorRegistry())
    return Registry(
        store, BASE, pool, BASE_FORMAT, metrics, **{"shapes": SHAPES, "poll_s": 0.005, **options}
    )


async def started(store: AdapterStore, **options: Any) -> Registry:
    made = registry(store, **options)
    await made.start()
    await made.stop()
    return made


async def test_crma_is_the_backbone_that_serves_a_descendant_of_the_one_a_task_records(
    store: AdapterStore,
) -> None:
    recorded = publish_backbone(store).digest
    task = publish(store, "with", backbone=recorded).digest
    serving = publish_backbone(store, 1, lineage=(recorded,)).digest
    assert (await started(store)).resolve("with", None).selection == (task, serving)


async def test_names_versions_and_formats(store: AdapterStore) -> None:
    first = publish(store, "task", 0).digest
    second = publish(store, "task", 1, prompt_format=None).digest
    third = publish(store, "task", 2, serve=False).digest
    made = await started(store)
    resolved = [made.resolve(name, None) for name in ("task", "task@v1", "task@v2", "task@v3")]
    assert [each.selection.task_digest for each in resolved] == [second, first, second, third]
    assert [each.prompt_format for each in resolved] == [BASE_FORMAT, FORMAT, BASE_FORMAT, FORMAT]
    assert made.resolve(None, None).prompt_format == BASE_FORMAT
    assert [entry.version for entry in made.serving_tasks()] == ["v2"]
    with pytest.raises(
        NotFound, check=lambda error: error.allowed == ["task@v1", "task@v2", "task@v3"]
    ):
        made.resolve("task@v4", None)


async def test_what_is_published_while_it_serves_appears_by_itself(store: AdapterStore) -> None:
    first = publish(store, "task", 0).digest
    made = registry(store)
    await made.start()
    before = made.resolve("task", None)
    second = publish(store, "task", 1).digest
    hidden = publish(store, "task", 2, serve=False).digest  # channels.json stays as it is
    async with asyncio.timeout(10):
        while set(made.names()) != {first, second, hidden}:
            await asyncio.sleep(0.001)
    await made.stop()
    assert before.selection.task_digest == first
    assert made.resolve("task", None).selection.task_digest == second
    estimate = made.pool._residents.sizes[hidden]
    made.pool.load(hidden)
    assert estimate == sum(tensor.nbytes for tensor in made.pool.loras[hidden].parameters()) > 0


@pytest.mark.parametrize("file", ["manifest.json", "adapter_model.safetensors"])
async def test_a_bad_version_is_refused_and_the_others_serve(
    store: AdapterStore, file: str
) -> None:
    publish(store, "good", 0)
    made = await started(store)
    flip_bit(publish(store, "bad", 1).path / file)
    await made.refresh()
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            made.resolve("bad", None)
        assert len(caught.traceback) < 8
    assert made.resolve("good", None).selection.task_digest is not None
    assert made.metrics.registry.get_sample_value("crma_adapter_verification_failures_total") == 1


@pytest.mark.parametrize("served_before", [True, False])
async def test_damaged_channels_leave_what_serves(store: AdapterStore, served_before: bool) -> None:
    publish(store, "task")
    channels = (store.root / "channels.json").read_text()
    made = registry(store)
    if served_before:
        await made.refresh()
    (store.root / "channels.json").write_text("{")
    await made.start()
    await made.stop()
    assert made.verified
    assert made.resolve(None, None).selection.variant == "base"
    assert list(made.names().values()) == ["task"] * served_before
    (store.root / "channels.json").write_text(channels)
    await made.refresh()
    assert made.resolve("task", None).task is not None


async def test_what_replaces_a_resident_version_is_loaded_before_it_serves(
    store: AdapterStore, caplog: Any
) -> None:
    old = [publish(store, "warm", 0).digest, publish_backbone(store).digest]
    publish(store, "cold", 1)
    made = await started(store)
    for digest in old:
        made.pool.load(digest)
    new = [publish(store, "warm", 2).digest, publish_backbone(store, 1).digest]
    publish(store, "cold", 3)
    changed: list[str] = []
    made.pool.on_change = lambda: changed.append(
        str(made.resolve("warm", None).selection.task_digest)
    )
    await made.refresh()
    assert (set(made.pool.resident()), changed) == ({*old, *new}, [old[0]] * 2)
    assert [
        made.resolve("warm", None).selection.task_digest,
        made.resolve(None, True).selection.crma_digest,
    ] == new
    made.pool.pin(new[0])
    made.pool._residents.max_resident = (
        1  # so that there is no room for its successor, which serves all the same
    )
    last = publish(store, "warm", 4).digest
    await made.refresh()
    assert made.resolve("warm", None).selection.task_digest == last
    assert "tasks/warm/v3 is not loaded before it serves: no room" in caplog.text
