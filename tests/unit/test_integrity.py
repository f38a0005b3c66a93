"""Stores that were damaged or made to deceive: never loaded, always reported."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import BASE, KEY, OTHER, SHAPES, WEIGHTS, publish, publish_backbone, retensor, rewrite

from crma.errors import BaseMismatch, DigestMismatch, InvalidAdapter, StoreError
from crma.store import AdapterStore


@pytest.fixture
def hostile(tmp_path: Path) -> AdapterStore:
    """A store with one backbone and one task trained on it, to be damaged."""
    store = AdapterStore(tmp_path / "hostile")
    publish(store, backbone=publish_backbone(store).digest)
    return store


def remanifest(field: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, field: value}))

    return damage


def relink(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        outside = folder.parents[3] / f"outside-{name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return damage


def relink_folder(folder: Path) -> None:
    outside = folder.parents[3] / "outside"
    shutil.move(folder, outside)
    folder.symlink_to(outside)


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def flip_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


HUGE_HEADER = struct.pack("<Q", 2**62) + b"{}"
OVERLAP = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (flip_bit, DigestMismatch, "not the file that was published"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), DigestMismatch, "not the file"),
        (lambda f: rewrite(f, WEIGHTS, (f / WEIGHTS).read_bytes()[:-8]), InvalidAdapter, "not a safetensors file"),
        (lambda f: rewrite(f, WEIGHTS, b""), InvalidAdapter, "not a safetensors file"),
        (lambda f: rewrite(f, WEIGHTS, HUGE_HEADER), InvalidAdapter, "not a safetensors file"),
        (lambda f: rewrite(f, WEIGHTS, b"\x80\x04pickled"), InvalidAdapter, "not a safetensors file"),
        (
            lambda f: rewrite(f, WEIGHTS, struct.pack("<Q", len(OVERLAP)) + OVERLAP + bytes(4)),
            InvalidAdapter,
            "not a safetensors file",
        ),
        (lambda f: (f / WEIGHTS).unlink(), InvalidAdapter, "Missing"),
        (pipe, InvalidAdapter, "Not a plain file"),
        (relink(WEIGHTS), InvalidAdapter, "Cannot be opened"),
        (relink("manifest.json"), InvalidAdapter, "Cannot be opened"),
        (relink_folder, InvalidAdapter, "Not a folder of the store"),
        (lambda f: (f / "adapter_model.bin").write_bytes(b"\x80\x04."), InvalidAdapter, "Pickle is never read"),
        (lambda f: (f / "run.py").write_text("import os"), InvalidAdapter, "Not a file of this adapter"),
        (retensor(WEIGHTS, lambda t: t.update(extra=torch.zeros(1))), InvalidAdapter, "not a plain LoRA"),
        (retensor(WEIGHTS, lambda t: t.pop(KEY)), InvalidAdapter, "One of lora_A and lora_B is missing"),
        (
            retensor(WEIGHTS, lambda t: (t.pop(KEY), t.pop(KEY.replace("_A.", "_B.")))),
            InvalidAdapter,
            "without tensors",
        ),
        (retensor(WEIGHTS, lambda t: t.update({KEY: torch.zeros(4, 17)})), InvalidAdapter, "Does not fit"),
        (retensor(WEIGHTS, lambda t: t[KEY].fill_(torch.nan)), InvalidAdapter, "NaN"),
        (
            lambda f: rewrite(f, "adapter_config.json", b'{"peft_type": "LORA", "peft_type": 1}'),
            InvalidAdapter,
            "twice",
        ),
        (remanifest("surprise", 1), InvalidAdapter, "surprise"),
        (remanifest("digest", "sha256:" + "0" * 64), DigestMismatch, "digest"),
        (remanifest("name", "other"), InvalidAdapter, "another place"),
        (remanifest("version", "v2"), InvalidAdapter, "another place"),
        (remanifest("target_modules", ["q_proj"]), InvalidAdapter, "target_modules"),
        (remanifest("alpha", 4.0), InvalidAdapter, "scaling"),
        (lambda f: (f / "manifest.json").write_bytes(b" " * (5 * 2**20)), InvalidAdapter, "Too large"),
        (lambda f: (f / "manifest.json").unlink(), InvalidAdapter, "Cannot be opened"),
    ],
)
def test_a_damaged_task_is_refused_when_used_and_reported_by_verify(
    hostile: AdapterStore, damage: Callable[[Path], Any], error: type[StoreError], reason: str
) -> None:
    damage(hostile.root / "tasks" / "medical" / "v1")
    with pytest.raises(error, match=reason) as caught:
        hostile.task("medical").load(SHAPES)
    assert caught.value.message.startswith("tasks/medical/v1")
    problems = hostile.verify(base=BASE, shapes=SHAPES)
    assert any(type(problem) is error and reason in problem.message for problem in problems)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (retensor("crma.safetensors", lambda t: t.update(extra=torch.zeros(1))), "shape of the weights"),
        (retensor("crma.safetensors", lambda t: t.pop("gamma")), "shape of the weights"),
        (retensor("crma.safetensors", lambda t: t["S"].fill_(torch.nan)), "NaN"),
        (retensor("crma.safetensors", lambda t: t.update(S=t["S"].double())), "dtype"),
        (remanifest("config", {"num_layers": 3}), "config is not config.json"),
    ],
)
def test_a_damaged_backbone_is_refused_when_used_and_reported_by_verify(
    hostile: AdapterStore, damage: Callable[[Path], Any], reason: str
) -> None:
    damage(hostile.root / "backbones" / "v1")
    entry = hostile.backbone()
    assert entry is not None
    with pytest.raises(InvalidAdapter, match=reason):
        entry.load(SHAPES)
    assert any(reason in problem.message for problem in hostile.verify(shapes=SHAPES))


@pytest.mark.parametrize("claim", [{"num_layers": 10**15}, {"num_layers": "2"}, {"num_layers": 2.0}, {"surprise": 1}])
def test_a_backbone_config_that_lies_is_refused_before_anything_is_allocated(
    hostile: AdapterStore, claim: dict[str, Any]
) -> None:
    folder = hostile.root / "backbones" / "v1"
    config = {**json.loads((folder / "config.json").read_text()), **claim}
    rewrite(folder, "config.json", json.dumps(config).encode())
    remanifest("config", config)(folder)
    entry = hostile.backbone()
    assert entry is not None
    with pytest.raises(InvalidAdapter, match=r"config\.json"):
        entry.load()


def test_a_backbone_for_another_depth_or_width_does_not_fit(hostile: AdapterStore) -> None:
    entry = hostile.backbone()
    assert entry is not None
    deeper = {**SHAPES, "model.layers.2.self_attn.q_proj": (16, 16)}
    wider = dict.fromkeys(SHAPES, (16, 32))
    for shapes, field in ((deeper, "num_layers"), (wider, "hidden_size")):
        with pytest.raises(InvalidAdapter) as caught:
            entry.load(shapes)
        assert caught.value.field == field


@pytest.mark.parametrize("name", ["../hostile/tasks/medical", "/etc", "..", "base", "a\0b"])
def test_a_name_that_is_a_path_is_refused_before_the_file_system(hostile: AdapterStore, name: str) -> None:
    for look in (hostile.task, hostile.task_versions, lambda name: hostile.task("medical", name)):
        with pytest.raises(InvalidAdapter):
            look(name)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"format": 1, "surprise": 1}', "surprise"),
        (b'{"format": 2}', "format"),
        (b'{"format": 1, "tasks": {"../x": "v1"}}', "name"),
        (b'{"format": 1, "backbone": "../v1"}', "version"),
        (b"{", "JSON"),
    ],
)
def test_damaged_channels_are_refused_and_reported(hostile: AdapterStore, data: bytes, reason: str) -> None:
    (hostile.root / "channels.json").write_bytes(data)
    with pytest.raises(InvalidAdapter, match=reason):
        hostile.task("medical")
    with pytest.raises(InvalidAdapter):
        hostile.check_integrity()
    assert len(hostile.verify()) == 1


def test_verify_reports_every_problem_at_once(hostile: AdapterStore) -> None:
    assert hostile.verify(base=BASE, shapes=SHAPES) == []
    publish(hostile, "second")
    flip_bit(hostile.root / "tasks" / "second" / "v1")
    publish_backbone(hostile, seed=5)  # serves now, and "medical" was not trained on it
    (hostile.root / "tasks" / "Strange").mkdir()
    (hostile.root / "backbones" / "v7").mkdir()
    channels = json.loads((hostile.root / "channels.json").read_text())
    channels["tasks"]["gone"] = "v3"
    (hostile.root / "channels.json").write_text(json.dumps(channels))
    problems = hostile.verify(base=BASE, shapes=SHAPES)
    found = sorted((type(problem).__name__, problem.message.split(":")[0]) for problem in problems)
    assert found == [
        ("DigestMismatch", "tasks/second/v1"),
        ("InvalidAdapter", "backbones/v7"),
        ("InvalidAdapter", "channels.json"),
        ("InvalidAdapter", "tasks/Strange"),
        ("LineageMismatch", "tasks/medical/v1"),
    ]
    assert sum(isinstance(problem, BaseMismatch) for problem in hostile.verify(base=OTHER)) == 4
