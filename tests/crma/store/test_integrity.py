"""Damaged and hostile stores: nothing in them is loaded, and `verify` reports every problem."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from published import BASE, OTHER, SHAPE, WEIGHTS, publish, publish_backbone, rewrite
from tiny import flip_bit

from crma.core.errors import (
    BaseMismatch,
    DigestMismatch,
    InvalidAdapter,
    LineageMismatch,
    StoreError,
)
from crma.store.adapter_store import AdapterStore


@pytest.fixture
def hostile(tmp_path: Path) -> AdapterStore:
    """A store with one backbone and one task trained on it, to be damaged."""
    store = AdapterStore(tmp_path / "hostile")
    publish(store, backbone=publish_backbone(store).digest)
    return store


Damage = Callable[[Path], Any]


def remanifest(field: str, value: Any) -> Damage:
    """Changes one field of the manifest."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, field: value}))

    return damage


def relink(name: str) -> Damage:
    """Moves a file, or for "" the folder, out of the store and leaves a link to it."""

    def damage(folder: Path) -> None:
        outside = folder.parents[3] / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return damage


def claim_depth(folder: Path) -> None:
    """The config and the manifest agree on a size that no memory holds."""
    config = {**json.loads((folder / "config.json").read_text()), "num_layers": 10**15}
    rewrite(folder, "config.json", json.dumps(config).encode())
    remanifest("config", config)(folder)


def pipe(folder: Path) -> None:
    """A reader of the weights would wait forever."""
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def overflow(folder: Path) -> None:
    """Weights that are finite as they are stored, published before they were checked as served."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = torch.full_like(tensor, 3e38)
    rewrite(folder, WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def overflow_fold(folder: Path) -> None:
    """A control whose factors have no bound, likewise."""
    config = {**json.loads((folder / "config.json").read_text()), "mapping": "unbounded"}
    rewrite(folder, "config.json", json.dumps(config).encode())
    remanifest("config", config)(folder)
    name = "crma.safetensors"
    tensors = safetensors.torch.load_file(folder / name)
    tensors["W"].fill_(3.4e38)
    rewrite(folder, name, safetensors.torch.save(tensors))


HUGE_HEADER = struct.pack("<Q", 2**62) + b"{}"


DAMAGED_TASKS = [
    (lambda f: flip_bit(f / WEIGHTS), "not the file that was published"),
    (remanifest("digest", "sha256:" + "0" * 64), "digest is not that"),
    (lambda f: rewrite(f, WEIGHTS, HUGE_HEADER), "Not a safetensors file"),
    (lambda f: rewrite(f, WEIGHTS, b"\x80\x04pickled"), "Not a safetensors file"),
    (lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors: Missing"),
    (pipe, "Not a plain file"),
    (relink(WEIGHTS), "Cannot be opened"),
    (relink(""), "Not a folder of the store"),
    (lambda f: (f / "adapter_model.bin").write_bytes(b"\x80\x04."), "Does not belong in this"),
    (overflow, "down_proj: The weights overflow as they are served"),
    (remanifest("name", "other"), "Describes another folder"),
    (remanifest("target_modules", ["q_proj"]), "target_modules: The manifest contradicts"),
    (lambda f: (f / "manifest.json").write_bytes(b" " * (5 * 2**20)), "Too large"),
]
DAMAGED_BACKBONES = [
    (remanifest("config", {"num_layers": 3}), "The manifest contradicts config.json"),
    (claim_depth, "shape of the weights"),  # and nothing was allocated
    (overflow_fold, "overflow as they are served: folded"),
]
DAMAGED = [("tasks/medical/v1", *each) for each in DAMAGED_TASKS]
DAMAGED += [("backbones/v1", *each) for each in DAMAGED_BACKBONES]


@pytest.mark.parametrize(("place", "damage", "reason"), DAMAGED)
def test_a_damaged_version_is_refused_and_reported_by_verify(
    hostile: AdapterStore, place: str, damage: Damage, reason: str
) -> None:
    damage(hostile.root / place)
    with pytest.raises(StoreError, match=reason) as caught:
        (hostile.task("medical") if "medical" in place else hostile.backbone()).load(SHAPE)
    error = caught.value
    is_about_digests = "published" in reason or "digest" in reason
    assert isinstance(error, DigestMismatch if is_about_digests else InvalidAdapter)
    assert error.message.startswith(f"{place}: ")
    assert None not in (error.field, error.allowed)
    problems = [problem.message for problem in hostile.verify(base=BASE, shape=SHAPE)]
    reported = [message for message in problems if message.startswith(f"{place}: ")]
    assert [message for message in reported if re.search(reason, message)]


def test_verify_reports_adapters_that_do_not_fit_the_base_model(hostile: AdapterStore) -> None:
    deeper = replace(SHAPE, num_layers=SHAPE.num_layers + 1)
    wider = replace(SHAPE, hidden_size=64, linears=dict.fromkeys(SHAPE.linears, (64, 64)))
    for shape, reason in (
        (deeper, "num_layers"),
        (wider, "hidden_size"),
        (wider, "Does not fit the base model"),
    ):
        assert any(reason in problem.message for problem in hostile.verify(shape=shape))


def test_verify_reports_a_forged_certificate(hostile: AdapterStore) -> None:
    """The digest does not cover the manifest, so the certificate is computed again."""
    remanifest("certificate", {"max_bound": 1.0})(hostile.root / "backbones" / "v1")
    assert [problem.field for problem in hostile.verify()] == ["max_bound"]


NAMES = [
    "",
    "base",
    "Medical",
    "-a",
    ".a",
    "a\\b",
    "..",
    "a" * 65,
    "a\n",
    "é",
    "a\0",
    "/etc",
    "../hostile/x",
]
VERSIONS = ["", "1", "v", "v0", "v01", "v1/..", "v1\n", "v" + "9" * 10, "V1", "v١", ".."]


def test_an_invalid_name_or_version_never_reaches_the_file_system(hostile: AdapterStore) -> None:
    calls = [(partial(hostile.task, name), name) for name in NAMES]
    calls += [(partial(hostile.task_versions, name), name) for name in NAMES]
    calls += [(partial(hostile.task, "medical", version), version) for version in VERSIONS]
    for call, value in calls:
        with pytest.raises(InvalidAdapter, check=lambda error, value=value: error.value == value):
            call()


DAMAGED_CHANNELS = [
    (b'{"format": 1, "surprise": 1}', "surprise"),
    (b'{"format": 1, "tasks": {"../x": "v1"}}', "name"),
    (b'{"format": 1, "tasks": {"x": "../v1"}}', "version"),
    (b"{", "JSON"),
]


@pytest.mark.parametrize(("data", "reason"), DAMAGED_CHANNELS)
def test_damaged_channels_are_refused_and_reported(
    hostile: AdapterStore, data: bytes, reason: str
) -> None:
    (hostile.root / "channels.json").write_bytes(data)
    with pytest.raises(InvalidAdapter, match=reason):
        hostile.task("medical")
    (problem,) = hostile.verify()
    assert re.search(reason, problem.message)


def test_verify_reports_every_problem_at_once(hostile: AdapterStore) -> None:
    assert hostile.verify(base=BASE, shape=SHAPE) == []
    publish(hostile, "second")
    flip_bit(hostile.root / "tasks" / "second" / "v1" / WEIGHTS)
    publish_backbone(hostile, seed=5, serve=False)  # "medical" was not trained on it
    (hostile.root / "tasks" / "Strange").mkdir()
    (hostile.root / "backbones" / "v7").mkdir()
    channels = hostile.root / "channels.json"
    edited = channels.read_text().replace('"tasks": {', '"tasks": {"gone": "v3", ')
    channels.write_text(edited.replace('"backbone": "v1"', '"backbone": "v2"'))
    problems = hostile.verify(base=BASE, shape=SHAPE)
    found = sorted((type(problem).__name__, problem.message.split(":")[0]) for problem in problems)
    assert found == [
        ("DigestMismatch", "tasks/second/v1"),
        ("InvalidAdapter", "backbones/v7"),
        ("InvalidAdapter", "channels.json"),
        ("InvalidAdapter", "tasks/Strange"),
        ("LineageMismatch", "tasks/medical/v1"),
    ]
    assert sum(isinstance(problem, BaseMismatch) for problem in hostile.verify(base=OTHER)) == 4


@pytest.mark.parametrize("serving", ["null", '"v2"'])
def test_verify_reports_a_serving_task_that_cannot_serve(
    hostile: AdapterStore, serving: str
) -> None:
    """A store whose first backbone an earlier version rolled back printed a tick."""
    task, trained_on = hostile.task("medical"), hostile.backbone()
    stranger = publish_backbone(hostile, seed=5, serve=False)
    channels = hostile.root / "channels.json"
    text = channels.read_text().replace('"backbone": "v1"', f'"backbone": {serving}')
    channels.write_text(text)
    problems = [each for each in hostile.verify(base=BASE) if isinstance(each, LineageMismatch)]
    (problem,) = problems
    assert problem.message.startswith("tasks/medical/v1: ")
    assert task.digest in problem.message
    assert trained_on.digest in problem.message
    assert (stranger.digest in problem.message) == (serving == '"v2"')
