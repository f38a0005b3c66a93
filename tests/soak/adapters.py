"""The store of the soak: shipped adapters, others to publish in their place, folders to upload."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from paths import STORE
from safetensors.torch import load_file, save_file

from crma.method.lora import Lora
from crma.models.base_model import find_base
from crma.store.adapter_store import AdapterStore
from crma.store.entry import TaskEntry
from crma.store.manifest import TASK_FILES

STABLE = ("legal", "science")  # what ablations ask: never published over, and never deleted
CHURNED = ("medical", "code")
UPLOADED = ("up-a", "up-b")  # known by their uploads only
STRENGTHS = (0.5,)


@dataclass(frozen=True)
class Adapters:
    """Everything that is published, from the start or again and again.

    Args:
        store: the server's.
        variants: task of CHURNED -> its weights at several strengths.
        uploads: task of UPLOADED -> folders in PEFT's format.
        overflowing: a folder whose weights are finite until they are scaled.
    """

    store: AdapterStore
    variants: dict[str, list[Lora]]
    uploads: dict[str, list[Path]]
    overflowing: Path

    def publish(self, task: str, number: int) -> TaskEntry:
        """Publish one of the variants of a task; it serves."""
        like = self.store.task(task, "v1")
        return self.store.publish_task(
            task,
            self.variants[task][number],
            backbone=like.manifest.backbone,
            prompt_format=like.prompt_format,
            **_origin(like),
        )


def make_adapters(folder: Path) -> Adapters:
    """Copy the shipped store, publish a second backbone, and make what is published later.

    The second backbone descends from the first, which goes on serving.
    """
    root = folder / "store"
    shutil.copytree(STORE, root, ignore=shutil.ignore_patterns(".lock"))
    store = AdapterStore(root)
    _publish_descendant(store)
    variants = {
        task: [_weaker(store.task(task).load(), strength) for strength in STRENGTHS]
        for task in CHURNED
    }
    scratch = AdapterStore(folder / "scratch")
    uploads = {
        task: [_published(scratch, store.task(like), strength) for strength in (0.65, 0.9)]
        for task, like in zip(UPLOADED, STABLE, strict=True)
    }
    overflowing = folder / "overflowing"
    shutil.copytree(uploads[UPLOADED[0]][0], overflowing)
    _overflow(overflowing / TASK_FILES[1])
    return Adapters(store, variants, uploads, overflowing)


def _publish_descendant(store: AdapterStore) -> None:
    first = store.backbone("v1")
    assert first is not None
    backbone = first.load()
    with torch.no_grad():
        backbone.W.mul_(0.5)
    store.publish_backbone(
        backbone, lineage=(first.digest, *first.manifest.lineage), serve=False, **_origin(first)
    )


def _weaker(lora: Lora, strength: float) -> Lora:
    pairs = {name: replace(pair, B=pair.B * strength) for name, pair in lora.pairs.items()}
    return replace(lora, pairs=pairs)


def _published(store: AdapterStore, like: TaskEntry, strength: float) -> Path:
    """The folder of a weaker adapter in a store that nobody serves."""
    lora = _weaker(like.load(), strength)
    entry = store.publish_task(
        like.name, lora, backbone=None, prompt_format=like.prompt_format, **_origin(like)
    )
    return entry.path


def _overflow(weights: Path) -> None:
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        tensors[name] = torch.full(tensor.shape, 3e38) if "lora_B" in name else tensor.float()
    save_file(tensors, weights, {"format": "pt"})


def _origin(like: Any) -> dict[str, Any]:
    manifest = like.manifest
    fields = ("trained_on", "measured", "licence")
    return {"base": find_base(), **{field: getattr(manifest, field) for field in fields}}
