"""server.service.store_reader: versions are read once, and a look costs the same at any size."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from published import BASE, SHAPE, WEIGHTS, publish, publish_backbone
from signing_keys import make_keys
from tiny import flip_bit

from crma.core.files import locked
from crma.store import entry as entries
from crma.store.adapter_store import AdapterStore
from crma.store.signature import signature_path
from crma.store.signing import sign_versions
from server.service import store_reader
from server.service.store_reader import StoreReader


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def num_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of weights was read, by the place of its version."""
    counted: Counter[str] = Counter()
    read = entries.read_regular

    def read_counted(path: Path, limit: int) -> bytes:
        if path.name == WEIGHTS:
            counted["/".join(path.parts[-4:-1])] += 1
        return read(path, limit)

    monkeypatch.setattr(entries, "read_regular", read_counted)
    return counted


def reader(store: AdapterStore) -> StoreReader:
    """A reader that has verified and read a store."""
    made = StoreReader(store, BASE, SHAPE, True, lambda _: None)
    assert made.verify() == []
    made.read()
    return made


def test_weights_are_read_once_at_the_start_and_again_only_if_they_changed(
    store: AdapterStore, num_reads: Counter[str]
) -> None:
    """They were read to verify the store, and once more to serve it."""
    publish(store, "kept", 0)
    file = publish(store, "touched", 1).path / WEIGHTS
    made = reader(store)
    assert num_reads == {"tasks/kept/v1": 1, "tasks/touched/v1": 1}
    flip_bit(file)
    publish(store, "new", 2)
    num_reads.clear()
    view = made.read()
    assert num_reads == {"tasks/touched/v1": 1, "tasks/new/v1": 1}
    assert list(view.problems) == ["touched"]


def test_a_version_of_a_task_that_begins_to_serve_is_known(
    store: AdapterStore, num_reads: Counter[str]
) -> None:
    digest = publish(store, "task", 0).digest
    publish(store, "task", 1)
    made = reader(store)
    num_reads.clear()
    store.roll_back("tasks/task")
    assert made.has_changed()
    assert made.read().serving_tasks()["task"].digest == digest
    assert num_reads == {}
    assert made.num_parameters("tasks/task/v1") == made.num_parameters("tasks/task/v2") > 0


def num_calls(made: StoreReader, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a look at an unchanged store asks the file system."""
    count = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "scandir", "listdir", "open"):
            patch.setattr(os, name, counted(getattr(os, name)))
        assert not made.has_changed()
    return count


def test_a_look_costs_the_same_however_many_tasks_there_are(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listed the versions of every task, every two seconds."""
    monkeypatch.setattr(store_reader, "LOOKED_AT", 2)
    counts = []
    for number in range(6):
        publish(store, f"task-{number}", number)
        counts.append(num_calls(reader(store), monkeypatch))
    assert len(set(counts)) == 1


def copy_version(store: AdapterStore) -> None:
    shutil.copytree(store.root / "tasks/last/v1", store.root / "tasks/last/v2")


def remove_version(store: AdapterStore) -> None:
    shutil.rmtree(store.root / "tasks/last/v1")


def remove_signature(store: AdapterStore) -> None:
    signature_path(store.root, "tasks/last/v1").unlink()


def replace_signature(store: AdapterStore) -> None:
    signature_path(store.root, "tasks/last/v1").write_text("{}")


@pytest.mark.parametrize(
    "change", [copy_version, remove_version, remove_signature, replace_signature]
)
def test_what_is_changed_without_the_lock_is_found_when_its_turn_comes(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setattr(store_reader, "LOOKED_AT", 2)
    for number, name in enumerate(("a", "b", "c", "d", "last")):
        publish(store, name, number)
    sign_versions(store, make_keys(tmp_path, "own").private)
    made = reader(store)
    assert not any(made.has_changed() for _ in range(6))
    change(store)
    assert any(made.has_changed() for _ in range(3))


def test_whoever_had_the_lock_may_have_changed_anything(store: AdapterStore) -> None:
    publish(store, "task")
    publish_backbone(store)
    made = reader(store)
    with locked(store.root):
        pass
    assert made.has_changed()
    made.read()
    assert not made.has_changed()


def test_the_mark_of_a_writer_needs_no_ownership(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its owner may give a file another time than now."""
    publish(store, "task")
    made = reader(store)
    real = os.utime

    def as_another_user(descriptor: int, **options: Any) -> None:
        if options:
            raise PermissionError
        real(descriptor)

    os.utime(store.root / ".lock", ns=(0, 0))
    made.read()
    monkeypatch.setattr(os, "utime", as_another_user)
    with locked(store.root):
        pass
    assert made.has_changed()
