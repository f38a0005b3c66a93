"""crma.store.serving: what may serve together, and no change leaves a serving task unable to."""

from collections.abc import Callable
from pathlib import Path

import pytest
from published import BASE, OTHER, publish, publish_backbone

from crma.core.errors import BaseMismatch, LineageMismatch
from crma.store.adapter_store import AdapterStore
from crma.store.serving import check_selection


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Serves backbone v1 and "medical", trained on it. Backbone v2 is a stranger to both."""
    store = AdapterStore(tmp_path / "store")
    publish(store, backbone=publish_backbone(store).digest)
    publish_backbone(store, seed=1, serve=False)
    return store


def publish_for_stranger(store: AdapterStore) -> None:
    publish(store, "other", 3, backbone=store.backbone("v2").digest)


def test_a_selection_needs_the_same_base_and_a_backbone_of_the_tasks_lineage(
    store: AdapterStore,
) -> None:
    first, stranger = store.backbone(), store.backbone("v2")
    task = store.task("medical")
    second = publish_backbone(store, seed=2, lineage=[first.digest])
    imported = publish(store, "imported", backbone=None)
    younger = publish(store, "younger", backbone=second.digest)
    for allowed in [
        (None, None),
        (task, None),
        (None, first),
        (task, first),
        (task, second),
        (imported, None),
    ]:
        check_selection(*allowed, BASE.digest)
    for refused in [(task, stranger), (imported, first), (younger, first)]:
        with pytest.raises(LineageMismatch):
            check_selection(*refused, BASE.digest)
    for selection in [(task, None), (None, first)]:
        with pytest.raises(BaseMismatch):
            check_selection(*selection, OTHER.digest)


CHANGES: dict[str, Callable[[AdapterStore], object]] = {
    "stop the backbone": lambda store: store.set_serving({"backbone": None}),
    "move the backbone": lambda store: store.set_serving({"backbone": "v2"}),
    "publish a backbone": lambda store: publish_backbone(store, seed=2),
    "publish a task": publish_for_stranger,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_that_strands_a_task_is_refused_and_changes_nothing(
    store: AdapterStore, change: Callable[[AdapterStore], object]
) -> None:
    before = sorted(store.root.rglob("*")), (store.root / "channels.json").read_bytes()
    with pytest.raises(LineageMismatch, match="cannot: it was trained on backbone sha256:"):
        change(store)
    after = sorted(store.root.rglob("*")), (store.root / "channels.json").read_bytes()
    assert after == before


def test_a_task_does_not_roll_back_to_a_version_that_the_serving_backbone_does_not_fit(
    store: AdapterStore,
) -> None:
    medical = publish(store, seed=1)  # v2 needs no backbone, so the backbone may go
    store.set_serving({"backbone": None})
    with pytest.raises(LineageMismatch, match="tasks/medical/v1"):
        store.roll_back("tasks/medical")
    assert store.task("medical") == medical


def test_a_backbone_moves_together_with_the_tasks_that_need_it(store: AdapterStore) -> None:
    publish(store, "other", 3, backbone=store.backbone("v2").digest, serve=False)
    store.set_serving({"backbone": "v2", "tasks/medical": None, "tasks/other": "v1"})
    assert store.verify() == []


def test_a_task_that_was_stranded_before_does_not_stop_other_changes(store: AdapterStore) -> None:
    """Otherwise a store with two such tasks could not be mended one at a time."""
    publish(store, "legal", 2, backbone=store.backbone().digest)
    channels = store.root / "channels.json"
    channels.write_text(channels.read_text().replace('"backbone": "v1"', '"backbone": null'))
    publish(store, "imported", 4)
    store.set_serving({"tasks/legal": None})
    store.set_serving({"backbone": "v1"})
    assert set(store.task_names()) == {"imported", "medical"}
