"""crma.store.removal: versions go whole, never while they serve, and their numbers with them."""

from pathlib import Path

import pytest
from published import BASE, CHANGES, dying, publish

from crma.core.errors import InvalidAdapter, NotFound, VersionServes
from crma.core.files import locked
from crma.store.adapter_store import AdapterStore

SERVING = "medical@v3"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """A store with three versions of one task, of which the last serves, and another task."""
    store = AdapterStore(tmp_path / "store")
    for seed in range(3):
        publish(store, seed=seed)
    publish(store, "legal")
    return store


def test_one_version_goes_and_the_others_stay(store: AdapterStore) -> None:
    assert store.remove_task("medical", "v1") == ("v1",)
    assert store.task_versions("medical") == ("v2", "v3")
    assert store.task("medical").version == "v3"
    assert store.verify(base=BASE) == []


def test_all_versions_go_with_the_folder_of_the_task(store: AdapterStore) -> None:
    store.set_serving({"tasks/medical": None})
    assert store.remove_task("medical") == ("v1", "v2", "v3")
    assert not (store.root / "tasks" / "medical").exists()
    assert store.task_names() == ("legal",)
    assert store.verify(base=BASE) == []


@pytest.mark.parametrize("version", ["v3", None])
def test_a_version_that_serves_stays_and_so_do_all_others(
    store: AdapterStore, version: str | None
) -> None:
    with pytest.raises(VersionServes, match="serves") as caught:
        store.remove_task("medical", version)
    assert caught.value.value == SERVING
    assert store.task_versions("medical") == ("v1", "v2", "v3")


@pytest.mark.parametrize(
    ("name", "version", "allowed"),
    [
        ("nowhere", None, ["legal", "medical"]),
        ("medical", "v9", ["medical@v1", "medical@v2", "medical@v3"]),
        ("medical", "../../legal/v1", ["medical@v1", "medical@v2", "medical@v3"]),
    ],
)
def test_what_is_not_published_cannot_be_removed(
    store: AdapterStore, name: str, version: str | None, allowed: list[str]
) -> None:
    with pytest.raises(NotFound) as caught:
        store.remove_task(name, version)
    assert caught.value.allowed == allowed


def test_a_name_never_becomes_a_path(store: AdapterStore) -> None:
    with pytest.raises(InvalidAdapter):
        store.remove_task("../tasks/medical", "v1")


def test_the_number_of_a_removed_version_is_not_given_out_again(store: AdapterStore) -> None:
    """Else `medical@v3` would be another adapter than the one that the history names."""
    store.set_serving({"tasks/medical": "v1"})
    store.remove_task("medical", "v3")
    assert publish(store).version == "v4"
    store.set_serving({"tasks/medical": None})
    store.remove_task("medical")
    assert publish(store).version == "v5"


def test_a_roll_back_to_a_removed_version_is_refused_and_changes_nothing(
    store: AdapterStore,
) -> None:
    store.remove_task("medical", "v2")
    before = store.channels()
    with pytest.raises(NotFound, match="medical/v2"):
        store.roll_back("tasks/medical")
    assert store.channels() == before


@pytest.mark.parametrize("version", ["v1", None])
def test_a_removal_that_dies_at_any_step_leaves_each_version_whole_or_gone(
    tmp_path: Path, version: str | None
) -> None:
    for step in range(1, 30):
        store = AdapterStore(tmp_path / str(step))
        for seed in range(2):
            publish(store, seed=seed)
        store.set_serving({"tasks/medical": "v2" if version else None})
        with dying(step, CHANGES):
            store.remove_task("medical", version)
        assert store.verify(base=BASE) == [], step
        with locked(store.root):  # the next writer
            pass
        names = {path.name for path in store.root.iterdir()}
        assert names <= {"tasks", "channels.json", ".lock"}, step
    assert store.task_versions("medical") == (("v2",) if version else ())
