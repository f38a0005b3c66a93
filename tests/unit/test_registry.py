"""Which adapters a request means: every row of the rule for `crma`, and a store that changes while it serves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from crma.adapter import Backbone, CrmaConfig
from crma.errors import BaseMismatch, LineageMismatch, NotFound, StoreError
from crma.lora import Lora, LoraConfig, LoraPair
from crma.prompts import PromptFormat
from crma.pull import BaseModel
from crma.store import AdapterStore, BackboneEntry
from server.errors import NoBackbone
from server.metrics import Metrics
from server.registry import Registry

BASE = BaseModel("tiny", "sha256:" + "b" * 64, Path("nowhere"), {})
OTHER = BaseModel("other", "sha256:" + "c" * 64, Path("nowhere"), {})
MODULE = "model.layers.0.self_attn.q_proj"
BASE_FORMAT = PromptFormat("<", ">", "!")


class Loaders(dict):
    """A pool that only remembers."""

    def register(self, digest: str, loader: Any) -> None:
        self[digest] = loader


def publish(store: AdapterStore, name: str, backbone: BackboneEntry | None, seed: int, **options: Any) -> str:
    generator = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator), 1.0)
    entry = store.publish_task(
        name,
        Lora(LoraConfig(2, 2.0, ("q_proj",)), {MODULE: pair}),
        **{
            "base": BASE,
            "backbone": backbone and backbone.digest,
            "prompt_format": None,
            "trained_on": None,
            "measured": {},
            "licence": "x",
            **options,
        },
    )
    return entry.digest


def publish_backbone(store: AdapterStore, *lineage: str) -> BackboneEntry:
    config = CrmaConfig(num_layers=1, hidden_size=8, num_streams=2, stream_rank=2)
    backbone = Backbone(config, torch.Generator().manual_seed(len(lineage)))
    return store.publish_backbone(backbone, base=BASE, lineage=lineage, trained_on=None, measured={}, licence="x")


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def registry(store: AdapterStore, **options: Any) -> Registry:
    metrics = Metrics(CollectorRegistry())
    options = {"shapes": {MODULE: (8, 8)}, "pool": Loaders(), "base_format": BASE_FORMAT, **options}
    return Registry(store, BASE, metrics=metrics, poll_s=0.005, **options)


async def started(store: AdapterStore, **options: Any) -> Registry:
    made = registry(store, **options)
    await made.start()
    await made.stop()
    return made


@pytest.mark.parametrize(
    ("task", "crma", "variant"),
    [
        (None, None, "base"),
        (None, False, "base"),
        (None, True, "crma"),
        ("with", None, "task+crma"),
        ("with", True, "task+crma"),
        ("with", False, "task"),
        ("without", None, "task"),
        ("without", False, "task"),
    ],
)
async def test_what_crma_means(store: AdapterStore, task: str | None, crma: bool | None, variant: str) -> None:
    backbone = publish_backbone(store)
    digests = {"with": publish(store, "with", backbone, 0), "without": publish(store, "without", None, 1), None: None}
    resolved = (await started(store)).resolve(task, crma)
    assert resolved.selection.variant == variant
    assert resolved.selection.task_digest == digests[task]
    assert resolved.selection.crma_digest in (backbone.digest, None)
    assert resolved.crma == ("crma" in variant)


async def test_an_import_that_never_saw_crma_is_not_put_under_it(store: AdapterStore) -> None:
    publish_backbone(store)
    publish(store, "without", None, 1)
    with pytest.raises(LineageMismatch):
        (await started(store)).resolve("without", True)


async def test_a_descendant_of_the_recorded_backbone_serves_and_an_ancestor_does_not(store: AdapterStore) -> None:
    first = publish_backbone(store)
    publish(store, "early", first, 0)
    second = publish_backbone(store, first.digest)
    publish(store, "late", second, 1)
    made = await started(store)
    assert made.resolve("early", None).selection.crma_digest == second.digest
    store.set_serving("backbone", first.version)
    await made.refresh()
    assert made.resolve("early", None).selection.crma_digest == first.digest
    with pytest.raises(LineageMismatch):
        made.resolve("late", None)


async def test_an_adapter_of_another_base_does_not_serve(store: AdapterStore) -> None:
    publish(store, "foreign", None, 0, base=OTHER)
    made = await started(store)
    with pytest.raises(BaseMismatch):
        made.resolve("foreign", None)


async def test_without_a_backbone_only_crma_off_serves(store: AdapterStore) -> None:
    publish(store, "with", publish_backbone(store), 0)
    made = await started(store, load_backbone=False)
    for task, crma in ((None, True), ("with", True), ("with", None)):
        with pytest.raises(NoBackbone):
            made.resolve(task, crma)
    assert made.resolve("with", False).selection.variant == "task"
    assert made.backbone is None


async def test_names_and_versions(store: AdapterStore) -> None:
    first = publish(store, "task", None, 0)
    second = publish(store, "task", None, 1)
    third = publish(store, "task", None, 2, serve=False)
    made = await started(store)
    digests = [made.resolve(name, None).selection.task_digest for name in ("task", "task@v1", "task@v2", "task@v3")]
    assert digests == [second, first, second, third]
    with pytest.raises(NotFound) as caught:
        made.resolve("task@v4", None)
    assert caught.value.allowed == ["task@v1", "task@v2", "task@v3"]


async def test_the_format_is_the_adapters_else_the_bases(store: AdapterStore) -> None:
    own = PromptFormat("[", "]", "!")
    publish(store, "own", None, 0, prompt_format=own)
    publish(store, "import", None, 1)
    made = await started(store)
    assert [made.resolve(task, None).prompt_format for task in ("own", "import", None)] == [
        own,
        BASE_FORMAT,
        BASE_FORMAT,
    ]


async def test_what_is_published_while_it_serves_appears_by_itself(store: AdapterStore) -> None:
    first = publish(store, "task", None, 0)
    made = registry(store)
    await made.start()
    before = made.resolve("task", None)
    second = publish(store, "task", None, 1)
    hidden = publish(store, "task", None, 2, serve=False)  # channels.json stays as it is
    async with asyncio.timeout(10):
        while set(made.names()) != {first, second, hidden}:
            await asyncio.sleep(0.001)
    await made.stop()
    assert before.selection.task_digest == first
    assert made.resolve("task", None).selection.task_digest == second
    assert isinstance(made.pool, Loaders)
    assert set(made.pool) == {first, second, hidden}
    assert isinstance(made.pool[second](), Lora)


@pytest.mark.parametrize("damage", ["weights", "manifest", "shape"])
async def test_a_bad_version_is_refused_and_the_others_serve(store: AdapterStore, damage: str) -> None:
    publish(store, "good", None, 0)
    made = await started(store)
    publish(store, "bad", None, 1)
    folder = store.root / "tasks/bad/v1"
    if damage == "shape":
        made = registry(store, shapes={MODULE: (8, 9)})
    else:
        path = folder / ("manifest.json" if damage == "manifest" else "adapter_model.safetensors")
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-9])
    await made.refresh()
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            made.resolve("bad", None)
        assert len(caught.traceback) < 8
    if damage != "shape":
        assert made.resolve("good", None).selection.task_digest is not None


async def test_damaged_channels_leave_what_serves(store: AdapterStore) -> None:
    publish(store, "task", None, 0)
    made = await started(store)
    (store.root / "channels.json").write_text("{")
    await made.refresh()
    assert made.resolve("task", None).task is not None


async def test_damaged_channels_at_the_start_leave_the_base(store: AdapterStore) -> None:
    publish(store, "task", None, 0)
    (store.root / "channels.json").write_text("{")
    made = await started(store)
    assert made.verified
    assert made.resolve(None, None).selection.variant == "base"
    with pytest.raises(NotFound):
        made.resolve("task", None)


async def test_a_pin_is_one_pin_and_an_unpin_is_never_a_requests(store: AdapterStore) -> None:
    class Counting(Loaders):
        pins = 1  # a request's

        def pin(self, digest: str) -> None:
            self.pins += 1

        def unpin(self, digest: str) -> None:
            self.pins -= 1

    digest = publish(store, "task", None, 0)
    pool = Counting()
    made = await started(store, pool=pool)
    made.pin(digest), made.pin(digest)
    assert pool.pins == 2
    made.unpin(digest), made.unpin(digest)
    assert pool.pins == 1
