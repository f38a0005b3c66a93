"""Signed stores: what the key has not signed is refused, whatever the store says."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_signing import verifying
from published import BASE, SHAPE, WEIGHTS, make_lora, publish, publish_backbone, rewrite
from signing_keys import Keys, make_keys
from tiny import flip_bit

from crma.core.errors import ConfigError, NotFound, NotSigned, StoreError
from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES
from crma.store.peft_format import StoredLora, lora_to_peft
from crma.store.signature import signature_path, signed_copy
from crma.store.signing import sign_versions
from crma.store.stored_tensor import write_tensors


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "own")


@pytest.fixture
def store(tmp_path: Path, keys: Keys) -> AdapterStore:
    """A store that requires signatures, with a signed backbone and the signed task medical@v1."""
    root = tmp_path / "store"
    filled = AdapterStore(root)
    publish(filled, backbone=publish_backbone(filled).digest)
    signed = sign_versions(filled, keys.private)
    assert signed == ["backbones/v1", "tasks/medical/v1"]
    return AdapterStore(root, keys.public)


def peft_folder(store: AdapterStore, folder: Path) -> Path:
    """The PEFT files of the task, elsewhere."""
    folder.mkdir()
    for name in TASK_FILES:
        shutil.copy(store.task("medical").path / name, folder / name)
    return folder


# Versions -----------------------------------------------------------------------------------------


def test_a_signed_store_is_sound_and_an_unsigned_version_in_it_a_problem(
    store: AdapterStore,
) -> None:
    assert store.verify(base=BASE, shape=SHAPE) == []
    publish(AdapterStore(store.root), "legal", 1, serve=False)
    (problem,) = store.verify()
    assert isinstance(problem, NotSigned)
    assert "tasks/legal/v1" in problem.message
    assert AdapterStore(store.root).verify() == []  # nobody asks for signatures there


def remove(store: AdapterStore, keys: Keys) -> None:
    signature_path(store.root, "tasks/medical/v1").unlink()


def resign(store: AdapterStore, keys: Keys) -> None:
    sign_versions(store, make_keys(keys.private.parent, "other").private, ["tasks/medical/v1"])


def borrow(store: AdapterStore, keys: Keys) -> None:
    shutil.copy(
        signature_path(store.root, "backbones/v1"), signature_path(store.root, "tasks/medical/v1")
    )


def claim(store: AdapterStore, keys: Keys) -> None:
    """The manifest alone: its own digest does not cover it."""
    path = store.task("medical").path / "manifest.json"
    path.write_text(path.read_text().replace('"Apache-2.0"', '"MIT"', 1))


def exchange(store: AdapterStore, keys: Keys) -> None:
    """Other weights, with a manifest that agrees."""
    _, tensors = lora_to_peft(StoredLora.of(make_lora(5), torch.bfloat16), base_name=BASE.name)
    rewrite(store.task("medical").path, WEIGHTS, write_tensors(tensors))


def overwrite(data: str) -> Callable[[AdapterStore, Keys], None]:
    def damage(store: AdapterStore, keys: Keys) -> None:
        signature_path(store.root, "tasks/medical/v1").write_text(data)

    return damage


def pipe(store: AdapterStore, keys: Keys) -> None:
    path = signature_path(store.root, "tasks/medical/v1")
    path.unlink()
    os.mkfifo(path)


def link(store: AdapterStore, keys: Keys) -> None:
    path = signature_path(store.root, "tasks/medical/v1")
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGE = {
    "missing": remove,
    "of another key": resign,
    "of another version": borrow,
    "of another manifest": claim,
    "of other weights": exchange,
    "empty": overwrite(""),
    "no JSON": overwrite("{"),
    "no signature": overwrite("{}"),
    "a list": overwrite("[]"),
    "of another type": overwrite('{"mediaType": 1, "verificationMaterial": {}}'),
    "a pipe": pipe,
    "a link": link,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_wrong_signature_is_refused_by_name(
    store: AdapterStore, keys: Keys, damage: Callable[[AdapterStore, Keys], None]
) -> None:
    damage(store, keys)
    with pytest.raises(NotSigned, match="tasks/medical/v1"):
        store.check_signature(store.task("medical"))
    assert any(isinstance(problem, NotSigned) for problem in store.verify())


def test_what_is_compared_is_what_was_read(store: AdapterStore) -> None:
    """Files that are exchanged after they were read, and back for the check, do not count."""
    signed = store.task("medical").path
    evil = signed.parent / "evil"
    shutil.copytree(signed, evil)
    manifest = json.loads((evil / "manifest.json").read_text())
    (evil / "manifest.json").write_text(json.dumps({**manifest, "licence": "evil"}))
    signed.rename(signed.parent / "good")
    evil.rename(signed)
    read = store.task("medical")
    signed.rename(evil)
    (signed.parent / "good").rename(signed)
    with pytest.raises(StoreError):
        store.check_signature(read)


def test_other_tools_of_openssf_accept_the_signature_and_see_a_changed_file(
    store: AdapterStore, keys: Keys
) -> None:
    folder = store.task("medical").path
    signature = signature_path(store.root, "tasks/medical/v1")
    config = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    config.verify(folder, signature)
    flip_bit(folder / WEIGHTS)
    with pytest.raises(ValueError, match="mismatch"):
        config.verify(folder, signature)


# Signing ------------------------------------------------------------------------------------------


def test_a_damaged_version_is_not_signed(store: AdapterStore, keys: Keys) -> None:
    folder = publish(AdapterStore(store.root), "legal", 1).path
    flip_bit(folder / WEIGHTS)
    with pytest.raises(StoreError, match="legal"):
        sign_versions(store, keys.private)
    assert not signature_path(store.root, "tasks/legal/v1").exists()


def test_only_versions_without_a_signature_are_signed_unless_named(
    store: AdapterStore, keys: Keys
) -> None:
    assert sign_versions(store, keys.private) == []
    assert sign_versions(store, keys.private, ["backbones/v1"]) == ["backbones/v1"]
    with pytest.raises(NotFound, match="tasks/medical/v9"):
        sign_versions(store, keys.private, ["tasks/medical/v9"])


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PUBLIC KEY-----\n"])
def test_a_key_that_cannot_be_used_is_named(
    store: AdapterStore, keys: Keys, content: bytes | None
) -> None:
    for path in (keys.private, keys.public):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"own\.key cannot be used"):
        sign_versions(store, keys.private, ["backbones/v1"])
    with pytest.raises(ConfigError, match=r"own\.pub cannot be used"):
        store.check_signature(store.task("medical"))


# Serving ------------------------------------------------------------------------------------------


def test_nothing_unsigned_begins_to_serve(store: AdapterStore, keys: Keys, tmp_path: Path) -> None:
    publish(AdapterStore(store.root), "medical", 1, serve=False)
    before = store.channels()
    with pytest.raises(NotSigned, match="tasks/medical/v2"):
        store.set_serving({"tasks/medical": "v2"})
    with pytest.raises(NotSigned, match="no key"):
        store.import_peft(peft_folder(store, tmp_path / "peft"), "new", BASE)
    assert store.channels() == before
    assert store.task_versions("new") == ()
    sign_versions(store, keys.private)
    assert store.set_serving({"tasks/medical": "v2"}).tasks["medical"] == "v2"


def test_an_import_with_a_key_is_signed_before_it_serves(
    store: AdapterStore, keys: Keys, tmp_path: Path
) -> None:
    folder = peft_folder(store, tmp_path / "peft")
    entry = store.import_peft(folder, "new", BASE, shape=SHAPE, private_key=keys.private)
    assert store.channels().tasks["new"] == entry.version
    assert store.verify() == []
    other = make_keys(tmp_path, "other")
    with pytest.raises(NotSigned):
        store.import_peft(folder, "new", BASE, private_key=other.private, licence="MIT")
    assert store.channels().tasks["new"] == entry.version


def test_a_removed_version_leaves_no_signature_for_a_later_one(store: AdapterStore) -> None:
    publish(AdapterStore(store.root), "legal", 1, serve=False)
    path = signature_path(store.root, "tasks/legal/v1")
    path.parent.mkdir()
    path.write_text("{}")
    store.remove_task("legal")
    assert not path.exists()


# Folders from elsewhere ---------------------------------------------------------------------------


def test_a_folder_from_elsewhere_must_be_signed_as_a_whole(
    store: AdapterStore, keys: Keys, tmp_path: Path
) -> None:
    folder = peft_folder(store, tmp_path / "peft")
    with pytest.raises(NotSigned, match=r"holds no model\.sig"), signed_copy(folder, keys.public):
        pass
    command = [sys.executable, "-m", "model_signing", "sign", "key", folder]
    options = ["--signature", folder / "model.sig", "--private_key", keys.private]
    subprocess.run([*command, *options], check=True, capture_output=True)
    other = make_keys(tmp_path, "other").public
    with pytest.raises(NotSigned, match="does not count"), signed_copy(folder, other):
        pass
    with signed_copy(folder, keys.public) as copy:
        signed = {each.name: each.read_bytes() for each in folder.iterdir()}
        (folder / "tokenizer.json").write_text("{}")
        assert {each.name: each.read_bytes() for each in copy.iterdir()} == signed
    with pytest.raises(NotSigned, match=r"tokenizer\.json"), signed_copy(folder, keys.public):
        pass
