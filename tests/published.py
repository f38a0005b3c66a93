"""Publishes the tiny model's adapters for the tests of the store, and damages them."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import backbone, injection, lora

from crma.core.digests import content_digest, file_digest
from crma.models.base_model import BaseModel
from crma.models.model_shape import ModelShape
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry
from crma.store.manifest import TrainedOn

WEIGHTS = "adapter_model.safetensors"
BASE = BaseModel("tiny", "sha256:" + "a" * 64, Path("unused"), {})
OTHER = BaseModel("other", "sha256:" + "b" * 64, Path("unused"), {})
TRAINED = TrainedOn(
    data={"train": "sha256:" + "c" * 64}, seed=42, commit="abc", arm="MODULAR", config={"lr": 0.005}
)
SHAPE = ModelShape.of(injection().model)
make_lora = partial(lora, injection(), 4, "all-linear")
make_backbone = partial(backbone, injection())


def publish(store: AdapterStore, name: str = "medical", seed: int = 0, **changes: Any) -> TaskEntry:
    """As `tiny.publish`, with a record of its training."""
    return tiny.publish(store, BASE, name, seed, **{"trained_on": TRAINED, **changes})


def publish_backbone(store: AdapterStore, seed: int = 0, **changes: Any) -> BackboneEntry:
    """As `tiny.publish_backbone`, with a record of its training."""
    return tiny.publish_backbone(store, BASE, seed, **{"trained_on": TRAINED, **changes})


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file's bytes and makes the manifest agree, as an attacker would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = file_digest(folder / name)
    manifest["digest"] = content_digest(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Killed(BaseException):
    """The process died: no `except Exception` runs."""


CHANGES = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "chmod")


@contextmanager
def dying(step: int, at: tuple[str, ...] = CHANGES) -> Iterator[None]:
    """The process dies inside the block.

    Args:
        step: it dies at this change to the file system, counted from 1. After it, no change of any
            kind is made.
        at: the kinds of change that count: functions of `os`.
    """
    done = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if name in at:
                done += 1
            if done >= step:
                raise Killed
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        for name in CHANGES:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield
