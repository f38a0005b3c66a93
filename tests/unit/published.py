"""A tiny base model, LoRA and backbone, and how the tests publish and damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from crma.adapter import Backbone, CrmaConfig
from crma.lora import Lora, LoraConfig, LoraPair
from crma.manifest import TrainedOn, content_digest, file_digest
from crma.prompts import PromptFormat
from crma.pull import BaseModel
from crma.store import AdapterStore, BackboneEntry, TaskEntry

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BASE = BaseModel("tiny", "sha256:" + "a" * 64, Path("unused"), {})
OTHER = BaseModel("other", "sha256:" + "b" * 64, Path("unused"), {})
FORMAT = PromptFormat("<user>", "<assistant>", "</s>")
TRAINED = TrainedOn(data={"train": "sha256:" + "c" * 64}, seed=42, commit="abc", arm="MODULAR", config={"lr": 0.005})
PROVENANCE = {"base": BASE, "trained_on": TRAINED, "measured": {"loss": 0.5}, "licence": "Apache-2.0"}
SHAPES = {f"model.layers.{i}.self_attn.{name}": (16, 16) for i in range(2) for name in ("q_proj", "v_proj")}


def make_lora(seed: int = 0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    tensors = {path: [torch.randn(size, generator=generator) for size in ((4, 16), (16, 4))] for path in SHAPES}
    pairs = {path: LoraPair(A, B, 2.0) for path, (A, B) in tensors.items()}
    return Lora(LoraConfig(4, 8.0, ("q_proj", "v_proj")), pairs)


def make_backbone(seed: int = 0) -> Backbone:
    generator = torch.Generator().manual_seed(seed)
    backbone = Backbone(CrmaConfig(num_layers=2, hidden_size=16, num_streams=2, stream_rank=2), generator)
    with torch.no_grad():
        backbone.W.normal_(generator=generator)
    return backbone


def publish(store: AdapterStore, name: str = "medical", seed: int = 0, **changes: Any) -> TaskEntry:
    fields = {"lora": make_lora(seed), "backbone": None, "prompt_format": FORMAT, **PROVENANCE, **changes}
    return store.publish_task(name, **fields)


def publish_backbone(store: AdapterStore, seed: int = 0, **changes: Any) -> BackboneEntry:
    return store.publish_backbone(make_backbone(seed), **{"lineage": (), **PROVENANCE, **changes})


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Puts other bytes in a file and makes the manifest agree, as an attacker would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = file_digest(folder / name)
    manifest["digest"] = content_digest(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def retensor(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load((folder / name).read_bytes())
        change(tensors)
        rewrite(folder, name, safetensors.torch.save(tensors))

    return damage
