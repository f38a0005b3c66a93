"""How the tests of the store publish the tiny model's adapters, and damage them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import tiny
from tiny import backbone, injection, lora

from crma.manifest import TrainedOn, content_digest, file_digest
from crma.pull import BaseModel
from crma.store import AdapterStore, BackboneEntry, TaskEntry

WEIGHTS = "adapter_model.safetensors"
BASE = BaseModel("tiny", "sha256:" + "a" * 64, Path("unused"), {})
OTHER = BaseModel("other", "sha256:" + "b" * 64, Path("unused"), {})
TRAINED = TrainedOn(data={"train": "sha256:" + "c" * 64}, seed=42, commit="abc", arm="MODULAR", config={"lr": 0.005})
SHAPES = injection().shapes
make_lora, make_backbone = partial(lora, injection(), 4, "all-linear"), partial(backbone, injection())


def publish(store: AdapterStore, name: str = "medical", seed: int = 0, **changes: Any) -> TaskEntry:
    return tiny.publish(store, BASE, name, seed, **{"trained_on": TRAINED, **changes})


def publish_backbone(store: AdapterStore, seed: int = 0, **changes: Any) -> BackboneEntry:
    return tiny.publish_backbone(store, BASE, seed, **{"trained_on": TRAINED, **changes})


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Puts other bytes in a file and makes the manifest agree, as an attacker would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = file_digest(folder / name)
    manifest["digest"] = content_digest(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
