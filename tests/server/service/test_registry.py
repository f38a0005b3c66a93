"""server.service.registry: names resolve to adapters while the store changes underneath."""

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from published import BASE, SHAPE, publish, publish_backbone
from scripted_engine import ScriptedEngine
from tiny import FORMAT, flip_bit

from crma.core.errors import NotFound, StoreError
from crma.models.prompts import PromptFormat
from crma.store.adapter_store import AdapterStore
from server.service.caller import ANYONE
from server.service.metrics import Metrics
from server.service.registry import Registry

BASE_FORMAT = PromptFormat("<", ">", "!")


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def registry(store: AdapterStore, **options: Any) -> Registry:
    """A registry of a store for the tiny base, on a scripted engine; not started."""
    metrics = Metrics(CollectorRegistry())
    options = {"shape": SHAPE, "poll_s": 0.005, **options}
    return Registry(store, BASE, ScriptedEngine(), BASE_FORMAT, metrics, **options)


async def started(store: AdapterStore, **options: Any) -> Registry:
    """A registry that has read its store and no longer watches it."""
    made = registry(store, **options)
    await made.start()
    await made.stop()
    return made


async def test_a_task_runs_with_the_serving_backbone_that_descends_from_its_own(
    store: AdapterStore,
) -> None:
    recorded = publish_backbone(store).digest
    task = publish(store, "with", backbone=recorded).digest
    serving = publish_backbone(store, 1, lineage=(recorded,)).digest
    made = await started(store)
    assert made.resolve("with", None).selection == (task, serving)


async def test_a_name_resolves_to_its_serving_or_given_version_and_prompt_format(
    store: AdapterStore,
) -> None:
    first = publish(store, "task", 0).digest
    second = publish(store, "task", 1, prompt_format=None).digest
    third = publish(store, "task", 2, serve=False).digest
    made = await started(store)
    resolved = [made.resolve(name, None) for name in ("task", "task@v1", "task@v2", "task@v3")]
    assert [each.selection.task_digest for each in resolved] == [second, first, second, third]
    assert [each.prompt_format for each in resolved] == [BASE_FORMAT, FORMAT, BASE_FORMAT, FORMAT]
    assert made.resolve(None, None).prompt_format == BASE_FORMAT
    assert [entry.version for entry in made.serving_tasks(ANYONE)] == ["v2"]
    with pytest.raises(NotFound) as caught:
        made.resolve("task@v4", None)
    assert caught.value.allowed == ["task@v1", "task@v2", "task@v3"]


async def test_versions_published_while_serving_appear_without_a_restart(
    store: AdapterStore,
) -> None:
    first = publish(store, "task", 0).digest
    made = registry(store)
    await made.start()
    before = made.resolve("task", None)
    second = publish(store, "task", 1).digest
    hidden = publish(store, "task", 2, serve=False).digest  # does not change channels.json
    async with asyncio.timeout(10):
        while set(made.names()) != {first, second, hidden}:
            await asyncio.sleep(0.001)
    await made.stop()
    assert before.selection.task_digest == first
    assert made.resolve("task", None).selection.task_digest == second
    pool = made.engine.pool
    estimate = pool._residents.sizes[hidden]
    pool.load(hidden)
    num_bytes = sum(tensor.nbytes for tensor in pool.loras[hidden].parameters())
    assert estimate == num_bytes
    assert num_bytes > 0


@pytest.mark.parametrize("file", ["manifest.json", "adapter_model.safetensors"])
async def test_a_damaged_version_is_refused_and_the_others_serve(
    store: AdapterStore, file: str
) -> None:
    publish(store, "good", 0)
    made = await started(store)
    flip_bit(publish(store, "bad", 1).path / file)
    await made.refresh()
    for _ in range(2):  # the same error object again: its traceback must not grow
        with pytest.raises(StoreError) as caught:
            made.resolve("bad", None)
        assert len(caught.traceback) < 8
    assert made.resolve("good", None).selection.task_digest is not None
    failures = made.metrics.registry.get_sample_value("crma_adapter_verification_failures_total")
    assert failures == 1
    assert made.metrics.registry.get_sample_value("crma_store_problems") == 1


async def test_the_number_of_problems_falls_once_they_are_mended(store: AdapterStore) -> None:
    """The alert read a counter, and never cleared."""
    file = publish(store, "bad", 1).path / "manifest.json"
    flip_bit(file)
    made = await started(store)
    channels = (store.root / "channels.json").read_text()
    problems = [made.metrics.registry.get_sample_value("crma_store_problems")]
    flip_bit(file)
    for text in ("{", channels):
        (store.root / "channels.json").write_text(text)
        await made.refresh()
        problems.append(made.metrics.registry.get_sample_value("crma_store_problems"))
    assert problems == [1, 2, 0]


@pytest.mark.parametrize("served_before", [True, False])
async def test_a_damaged_channels_file_changes_nothing_until_it_is_repaired(
    store: AdapterStore, served_before: bool
) -> None:
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
    expected = ["task"] if served_before else []
    assert list(made.names().values()) == expected
    (store.root / "channels.json").write_text(channels)
    await made.refresh()
    assert made.resolve("task", None).task is not None


async def test_the_successor_of_a_resident_version_is_loaded_before_it_serves(
    store: AdapterStore,
) -> None:
    old_task = publish(store, "warm", 0).digest
    old_backbone = publish_backbone(store).digest
    publish(store, "cold", 1)
    made = await started(store)
    pool = made.engine.pool
    pool.load(old_task)
    pool.load(old_backbone)
    new_task = publish(store, "warm", 2).digest
    new_backbone = publish_backbone(store, 1).digest
    publish(store, "cold", 3)
    serving_at_load: list[str | None] = []

    def record() -> None:
        serving_at_load.append(made.resolve("warm", None).selection.task_digest)

    pool.on_change = record
    await made.refresh()
    assert set(pool.resident()) == {old_task, old_backbone, new_task, new_backbone}
    assert serving_at_load == [old_task, old_task]
    assert made.resolve("warm", None).selection.task_digest == new_task
    assert made.resolve(None, True).selection.crma_digest == new_backbone


async def test_a_successor_that_finds_no_room_serves_all_the_same(
    store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    first = publish(store, "warm", 0).digest
    publish(store, "warm", 2)
    made = await started(store)
    serving = made.resolve("warm", None).selection.task_digest
    assert serving not in (None, first)
    made.engine.pool.pin(serving)
    made.engine.pool._residents.max_resident = 1
    last = publish(store, "warm", 4).digest
    await made.refresh()
    assert made.resolve("warm", None).selection.task_digest == last
    assert "tasks/warm/v3 is not loaded before it serves: no room" in caplog.text


async def test_a_task_that_cannot_serve_is_a_problem_with_its_reason(store: AdapterStore) -> None:
    publish(store, "with", backbone=publish_backbone(store).digest)
    publish(store, "sound", 1)
    publish(store, "damaged", 2)
    assert (await started(store)).problems == {}
    flip_bit(store.task("damaged").path / "adapter_model.safetensors")
    channels = store.root / "channels.json"
    channels.write_text(channels.read_text().replace('"backbone": "v1"', '"backbone": null'))
    problems = (await started(store)).problems
    assert list(problems) == ["damaged", "with"]
    assert "not the file that was published" in problems["damaged"]
    assert "no backbone serves" in problems["with"]


async def test_a_backbone_that_the_operator_left_out_is_no_problem(store: AdapterStore) -> None:
    publish(store, "with", backbone=publish_backbone(store).digest)
    assert (await started(store, load_backbone=False)).problems == {}


async def test_a_damaged_backbone_is_a_problem_of_the_tasks_that_need_it(
    store: AdapterStore,
) -> None:
    backbone = publish_backbone(store)
    publish(store, "with", backbone=backbone.digest)
    publish(store, "without", 1)
    flip_bit(backbone.path / "crma.safetensors")
    assert list((await started(store)).problems) == ["with"]


async def timers_have_run() -> None:
    """Wait for the timers of the event loop that are due: a turn of it may begin before them."""
    due = asyncio.Event()
    asyncio.get_running_loop().call_later(0, due.set)
    await due.wait()


async def test_a_deleted_adapter_stays_loadable_for_a_while_and_then_is_forgotten(
    store: AdapterStore,
) -> None:
    entry = publish(store, "task")
    made = await started(store)
    store.set_serving({"tasks/task": None})
    await made.hold(entry)
    store.remove_task("task")
    await made.refresh()
    await made.engine.load(entry.digest)
    await made.engine.unload(entry.digest)
    made.forget([entry], after_s=0)
    await timers_have_run()
    with pytest.raises(StoreError):
        await made.engine.load(entry.digest)


async def test_an_adapter_that_is_published_again_while_it_is_held_is_not_forgotten(
    store: AdapterStore,
) -> None:
    entry = publish(store, "task")
    made = await started(store)
    store.set_serving({"tasks/task": None})
    await made.hold(entry)
    store.remove_task("task")
    assert publish(store, "task").digest == entry.digest
    await made.refresh()
    made.forget([entry], after_s=0)
    await timers_have_run()
    await made.engine.load(entry.digest)


async def test_a_view_that_was_read_earlier_never_replaces_a_later_one(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow poll that began before an upload used to hide the upload until the next poll."""
    publish(store, "old")
    made = await started(store)
    publish(store, "mid")
    read, has_read, go = made._reader.read, threading.Event(), threading.Event()

    def read_slowly() -> Any:
        view = read()
        has_read.set()
        assert go.wait(10)
        return view

    monkeypatch.setattr(made._reader, "read", read_slowly)
    polled = asyncio.create_task(made.refresh())
    await asyncio.to_thread(has_read.wait, 10)
    monkeypatch.setattr(made._reader, "read", read)
    publish(store, "new")
    uploaded = asyncio.create_task(made.refresh())
    for _ in range(20):  # threads start in order: a refresh that did not wait would be done
        await asyncio.to_thread(int)
    go.set()
    await asyncio.gather(polled, uploaded)
    assert made.task_names == ["mid", "new", "old"]


def problems(made: Registry) -> float | None:
    """The gauge of the problems in the store."""
    return made.metrics.registry.get_sample_value("crma_store_problems")


async def test_damage_that_a_load_finds_is_a_problem_until_the_file_is_mended(
    store: AdapterStore,
) -> None:
    """Only a reading of the store counted: an adapter that was damaged later failed every request,
    and the gauge stayed at 0. A file mended in place was not read again."""
    entry = publish(store, "task")
    file = entry.path / "adapter_model.safetensors"
    sound = file.read_bytes()
    made = await started(store)
    assert problems(made) == 0
    flip_bit(file)
    with pytest.raises(StoreError):
        await made.engine.load(entry.digest)
    await made.refresh()
    assert problems(made) == 1
    assert list(made.problems) == ["task"]
    num_found = made.metrics.registry.get_sample_value("crma_adapter_verification_failures_total")
    await made.refresh()
    assert num_found == 1  # and it is not found anew at every look
    file.write_bytes(sound)
    await made.refresh()
    assert (problems(made), made.problems) == (0, {})
    await made.engine.load(made.resolve("task", None).selection.task_digest)


async def test_damage_that_was_there_at_the_start_ends_when_it_is_mended(
    store: AdapterStore,
) -> None:
    entry = publish(store, "task")
    file = entry.path / "manifest.json"
    sound = file.read_bytes()
    file.write_bytes(b"{}")
    made = await started(store)
    assert problems(made) == 1
    file.write_bytes(sound)
    await made.refresh()
    assert problems(made) == 0
    assert made.resolve("task", None).task is not None


async def test_a_damaged_version_that_is_removed_is_no_problem(store: AdapterStore) -> None:
    publish(store, "task", 0)
    entry = publish(store, "task", 1, serve=False)
    (entry.path / "manifest.json").write_bytes(b"{}")
    made = await started(store)
    assert problems(made) == 1
    shutil.rmtree(entry.path)
    await made.refresh()
    assert problems(made) == 0
    reading = made._view
    await made.refresh()
    assert made._view is reading  # a version that has gone is looked for no more


async def test_the_drift_of_a_promotion_is_shown_until_it_is_rolled_back(
    store: AdapterStore,
) -> None:
    first = publish_backbone(store)
    publish(store, "task", backbone=first.digest)
    second = publish_backbone(store, 1, lineage=(first.digest,), serve=False)
    scores = {"task": {"loss": 1.0, "drift": 3.0, "change": 3.0}}
    evidence = {"lambda": 1.0, "tried": [{"lambda": 1.0, "harmed": [], "tasks": scores}]}
    store.set_serving({"backbone": second.version}, evidence=evidence)
    made = await started(store)
    value = made.metrics.registry.get_sample_value
    assert value("crma_promotion_drift_ratio", {"adapter": "task"}) == 0.03
    store.roll_back("backbone")
    await made.refresh()
    assert value("crma_promotion_drift_ratio", {"adapter": "task"}) is None
