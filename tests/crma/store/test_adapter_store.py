"""The store: published versions come back as stored, and channels decide which of them serve."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import STORE
from published import (
    BASE,
    OTHER,
    SHAPE,
    TRAINED,
    dying,
    make_backbone,
    make_lora,
    publish,
    publish_backbone,
)
from tiny import FORMAT, PROVENANCE

from crma.core.digests import content_digest, file_digest, files_digest
from crma.core.errors import BaseMismatch, InvalidAdapter, LineageMismatch, NotFound, StoreError
from crma.core.files import to_json
from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES, Blend
from crma.store.peft_format import lora_to_peft
from crma.store.publication import backbone_digest
from crma.store.stored_tensor import write_tensors


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    """An empty store, which must be sound at the end of the test."""
    store = AdapterStore(tmp_path / "store")
    yield store
    assert store.verify() == []


@pytest.fixture
def full(store: AdapterStore) -> AdapterStore:
    """The store with one backbone and one task trained on it."""
    backbone = publish_backbone(store)
    publish(store, backbone=backbone.digest)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes, of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Publishing ---------------------------------------------------------------------------------------


def test_a_published_task_comes_back_as_it_was_stored(store: AdapterStore) -> None:
    entry = publish(store)
    assert store.task("medical") == store.task("medical", "v1") == entry
    assert entry.prompt_format == FORMAT
    assert entry.manifest.trained_on == TRAINED
    assert (entry.manifest.rank, entry.manifest.alpha, entry.manifest.scaling) == (4, 8.0, 2.0)
    digests = {name: file_digest(entry.path / name) for name in entry.manifest.files}
    assert entry.digest == content_digest(digests)
    loaded = entry.load(SHAPE)
    stored = make_lora().to("cpu", torch.bfloat16)
    for a, b in zip(loaded.parameters(), stored.parameters(), strict=True):
        assert torch.equal(a, b)
    scalings = {path: pair.scaling for path, pair in loaded.pairs.items()}
    assert scalings == dict.fromkeys(stored.pairs, 2.0)


def test_a_published_backbone_comes_back_bit_for_bit_with_its_certificate(
    store: AdapterStore,
) -> None:
    first = publish_backbone(store)
    blend = Blend(parents=(first.digest, first.digest), **{"lambda": 0.5})
    second = publish_backbone(store, seed=1, lineage=[first.digest], blend=blend)
    assert store.backbone() == second
    assert store.backbone("v1") == first
    for name, tensor in make_backbone(1).tensors().items():
        assert torch.equal(second.load(SHAPE).tensors()[name], tensor)
    assert "max_movement" not in first.manifest.certificate
    assert second.manifest.certificate["max_movement"] > 0
    assert second.manifest.blend == blend


def test_the_shipped_adapters_would_be_published_under_their_digests_again() -> None:
    """Their bytes were written by an earlier version: writing must not change them."""
    shipped = AdapterStore(STORE)
    for name in shipped.task_names():
        entry = shipped.task(name)
        config, tensors = lora_to_peft(entry.read(), base_name=entry.manifest.base.name)
        files = dict(zip(TASK_FILES, (to_json(config), write_tensors(tensors)), strict=True))
        assert files_digest(files) == entry.digest
    backbone = shipped.backbone()
    assert backbone_digest(backbone.load()) == backbone.digest


def test_a_refused_publish_leaves_the_store_as_it_was(full: AdapterStore) -> None:
    before = contents(full.root)
    infinite = make_backbone()
    infinite.S.data[0, 0, 0] = torch.inf
    for wrong in (
        {"name": "../evil"},
        {"measured": {"loss": float("nan")}},
        {"backbone": "sha256:" + "d" * 64},
    ):
        with pytest.raises(StoreError) as caught:
            publish(full, **{"name": "new", **wrong})
        assert caught.value.field in (*wrong, "JSON")
    with pytest.raises(InvalidAdapter):
        full.publish_backbone(infinite, base=BASE, lineage=(), **PROVENANCE)
    assert contents(full.root) == before


def test_a_lineage_that_lacks_an_ancestor_or_changes_the_base_is_refused(
    store: AdapterStore,
) -> None:
    first = publish_backbone(store)
    second = publish_backbone(store, seed=1, lineage=[first.digest])
    with pytest.raises(LineageMismatch):
        publish_backbone(store, seed=2, lineage=[second.digest])
    with pytest.raises(BaseMismatch):
        publish_backbone(store, seed=2, lineage=[first.digest], base=OTHER)
    with pytest.raises(LineageMismatch):
        publish(store, base=OTHER, backbone=first.digest)


# Channels -----------------------------------------------------------------------------------------


CHANNEL = "tasks/medical"


def test_a_channel_moves_and_rolls_back_with_its_evidence(store: AdapterStore) -> None:
    for seed in range(2):
        publish(store, seed=seed)
    store.set_serving({CHANNEL: "v1"}, evidence={"accuracy": 0.5})
    history = store.roll_back(CHANNEL, evidence={"accuracy": 0.4}).history
    moves = [(change.before, change.after, change.evidence) for change in history[1:]]
    assert moves == [
        ("v1", "v2", None),
        ("v2", "v1", {"accuracy": 0.5}),
        ("v1", "v2", {"accuracy": 0.4}),
    ]
    with pytest.raises(InvalidAdapter):
        store.set_serving({CHANNEL: "v1"}, evidence={"accuracy": float("inf")})


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    st.lists(
        st.sampled_from(["publish", "publish only", "roll back", "stop", 0, 1, 2]),
        min_size=5,
        max_size=12,
    )
)
def test_any_order_of_publishes_moves_and_roll_backs_behaves_like_a_stack(
    tmp_path_factory: Any, steps: list[str | int]
) -> None:
    store = AdapterStore(tmp_path_factory.mktemp("store"))
    published: list[str] = []
    served: list[str | None] = [None]
    for step in steps:
        if step in ("publish", "publish only"):
            serve = step == "publish"
            entry = publish(store, seed=len(published), serve=serve)
            published.append(entry.version)
            if serve:
                served.append(entry.version)
        elif step != "roll back":
            is_move = isinstance(step, int) and published
            version = published[step % len(published)] if is_move else None
            store.set_serving({CHANNEL: version})
            if version != served[-1]:
                served.append(version)
        elif len(served) > 1 and served[-2] is not None:
            store.roll_back(CHANNEL)
            served.pop()
        else:
            with pytest.raises(NotFound):
                store.roll_back(CHANNEL)
        assert store.task_versions("medical") == tuple(published)
        assert store.channels().version(CHANNEL) == served[-1]
        assert store.task_names() == (("medical",) if served[-1] else ())
        assert store.verify() == []


def test_the_first_backbone_cannot_be_rolled_back(full: AdapterStore) -> None:
    """Without a backbone, every task that was trained on one would be refused."""
    before = contents(full.root)
    with pytest.raises(NotFound, match="No backbone served before v1"):
        full.roll_back("backbone")
    assert contents(full.root) == before
    second = publish_backbone(full, seed=1, lineage=[full.backbone().digest])
    assert full.backbone() == second
    assert full.roll_back("backbone").serving() == {"backbone": "v1", "tasks/medical": "v1"}


def test_a_task_is_not_rolled_back_to_nothing(full: AdapterStore) -> None:
    """It stopped in silence."""
    before = contents(full.root)
    with pytest.raises(NotFound, match="Nothing served before v1 of tasks/medical"):
        full.roll_back(CHANNEL)
    assert contents(full.root) == before


@pytest.mark.parametrize("channel", ["backbon", "tasks/typo", "tasks/../up"])
def test_a_roll_back_of_no_channel_of_the_store_lists_them(
    full: AdapterStore, channel: str
) -> None:
    with pytest.raises(NotFound, match=f"no channel '{channel}'") as caught:
        full.roll_back(channel)
    assert caught.value.allowed == "backbone, tasks/medical"


def test_a_channel_moves_only_to_a_published_version(full: AdapterStore) -> None:
    before = contents(full.root)
    for channel, version in [(CHANNEL, "v7"), ("tasks/../backbones", "v1"), ("medical", "v1")]:
        with pytest.raises(StoreError):
            full.set_serving({channel: version})
    assert contents(full.root) == before


def test_concurrent_writers_lose_no_change_and_share_no_version(store: AdapterStore) -> None:
    def work(worker: int) -> None:
        own = AdapterStore(store.root)
        for _ in range(3):
            entry = publish(own, "shared", seed=worker)
            own.set_serving({"tasks/shared": entry.version})
            publish(own, f"own-{worker}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.task_versions("shared") == tuple(f"v{i}" for i in range(1, 13))
    assert store.task_names() == ("own-0", "own-1", "own-2", "own-3", "shared")
    changes = {(change.channel, change.after) for change in store.channels().history}
    assert changes >= {("tasks/shared", f"v{i}") for i in range(1, 13)}
    assert changes >= {(f"tasks/own-{i}", f"v{j}") for i in range(4) for j in range(1, 4)}
    assert store.verify(base=BASE, shape=SHAPE) == []


@pytest.mark.parametrize("existing", [False, True], ids=["first", "next"])
def test_a_publish_that_dies_at_any_step_shows_the_whole_version_or_nothing(
    tmp_path: Path, existing: bool
) -> None:
    outcomes = []
    finished = False
    while not finished:
        store = AdapterStore(tmp_path / str(len(outcomes)))
        before = (publish(store).version,) if existing else ()
        with dying(len(outcomes) + 1):
            publish(store, seed=1)
            finished = True
        assert store.verify(base=BASE, shape=SHAPE) == []
        after = store.task_versions("medical")
        serving = store.channels().version(CHANNEL)
        assert after[: len(before)] == before
        assert serving in (None, *after)
        newest_serves = bool(after) and serving == after[-1]
        outcomes.append((len(after) - len(before), newest_serves))
        publish(store, seed=2)  # the lock is free again
        assert not list(store.root.glob(".publishing-*"))
    assert outcomes == sorted(outcomes)  # nothing, then the version, then the version serving
    assert {(0, existing), (1, False), (1, True)} == set(outcomes)
    assert len(outcomes) > 15
