"""crma.store.garbage: what nothing needs any more, and above all what something needs."""

import tiny

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from crma.store.channels import task_channel
from crma.store.garbage import outdated


def test_what_serves_what_a_roll_back_would_serve_and_what_is_newer_stays(
    base: BaseModel, store: AdapterStore
) -> None:
    assert outdated(store.root) == {}
    for seed in range(4):
        tiny.publish(store, base, "new", seed)
    assert outdated(store.root) == {"new": ("v1", "v2")}
    store.roll_back(task_channel("new"))  # v3 serves, and would go back to v2
    assert outdated(store.root) == {"new": ("v1",)}
    store.roll_back(task_channel("new"))
    assert outdated(store.root) == {}
    assert store.roll_back(task_channel("new")).tasks["new"] == "v1"


def test_a_version_that_a_roll_back_would_serve_may_be_newer_than_what_serves(
    base: BaseModel, store: AdapterStore
) -> None:
    for seed in range(3):
        tiny.publish(store, base, "new", seed)
    store.set_serving({task_channel("new"): "v2"})
    assert outdated(store.root) == {"new": ("v1",)}


def test_a_task_that_stopped_keeps_all_its_versions(base: BaseModel, store: AdapterStore) -> None:
    for seed in range(3):
        tiny.publish(store, base, "new", seed)
    store.set_serving({task_channel("new"): None})
    assert outdated(store.root) == {}
