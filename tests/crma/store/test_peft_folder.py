"""A folder that is imported: which files are read, and for which base model it was made."""

import json
import logging
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from published import BASE, SHAPE
from safetensors.torch import load_file, save_file

from crma.core.errors import BaseMismatch, InvalidAdapter, NotFound
from crma.store.adapter_store import AdapterStore
from crma.store.entry import TaskEntry
from crma.store.peft_folder import model_name
from crma.store.peft_format import CONFIG, WEIGHTS, StoredLora, lora_to_peft
from crma.store.stored_tensor import write_tensors

BASE = replace(BASE, name="SmolLM2-135M-Instruct")
EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain LoRA as PEFT leaves it."""
    config, tensors = lora_to_peft(
        StoredLora.of(tiny.lora(tiny.injection(), 4, "first")), base_name="x"
    )
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": BASE.name}))
    (folder / WEIGHTS).write_bytes(write_tensors(tensors))
    return folder


def imported(folder: Path, **options: Any) -> TaskEntry:
    options = {"base": BASE, **options}
    return AdapterStore(folder.parent / "store").import_peft(folder, "task", shape=SHAPE, **options)


def rename_base(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


# The base model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "huggingfacetb/smollm2-135m-instruct",
        "/data/models/SmolLM2-135M-Instruct/",
        r"C:\models\SmolLM2-135M-Instruct",
        "/c/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/12fd25f77366fa6b3b4b",
        "/home/x/.cache/crma/models/HuggingFaceTB--SmolLM2-135M-Instruct",
    ],
)
def test_the_same_base_model_goes_by_many_names(named: str, folder: Path) -> None:
    rename_base(folder, base_model_name_or_path=named)
    assert imported(folder).version == "v1"
    assert imported(folder, base=replace(BASE, name=f"HuggingFaceTB--{BASE.name}")).version == "v2"


@pytest.mark.parametrize("named", ["Qwen/Qwen2.5-0.5B-Instruct", "SmolLM2-360M-Instruct", "x", 7])
def test_another_base_model_is_refused_unless_it_is_trusted(named: object, folder: Path) -> None:
    """It was imported in silence."""
    rename_base(folder, base_model_name_or_path=named)
    with pytest.raises(BaseMismatch) as refused:
        imported(folder)
    assert str(named) in refused.value.message
    assert BASE.name in refused.value.message
    assert "--trust-base" in refused.value.message
    assert imported(folder, trust_base=True).version == "v1"


def test_a_revision_of_the_base_model_is_refused_unless_it_is_trusted(folder: Path) -> None:
    rename_base(folder, revision="v2.0")
    with pytest.raises(BaseMismatch, match=r"revision v2\.0"):
        imported(folder)
    rename_base(folder, revision="main")
    assert imported(folder).version == "v1"


@pytest.mark.parametrize("named", [None, ""])
def test_an_adapter_that_names_no_base_model_is_imported_and_that_is_said(
    named: str | None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rename_base(folder, base_model_name_or_path=named)
    with caplog.at_level(logging.WARNING):
        imported(folder)
    assert "base_model_name_or_path is not set" in caplog.text


def test_a_name_is_compared_without_owner_and_folders() -> None:
    assert model_name("a/b--c") == model_name("C") == "c"


# The files ----------------------------------------------------------------------------------------


def test_a_missing_folder_and_a_missing_file_are_named(folder: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        imported(folder / "absent")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InvalidAdapter, match=rf"{WEIGHTS}: No such file"):
        imported(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(InvalidAdapter, match=rf"{CONFIG}: No such file"):
        imported(folder)


def run_advice(refused: pytest.ExceptionInfo[InvalidAdapter], folder: Path) -> None:
    """Run the command at the end of a refusal, as an operator would."""
    command = re.search(r"python -c .*$", refused.value.message)
    assert command is not None
    words = [sys.executable, *shlex.split(command[0])[1:]]
    subprocess.run(words, cwd=folder, check=True)


def test_a_pickle_is_not_opened_and_the_refusal_says_how_to_convert_it(folder: Path) -> None:
    expected = imported(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InvalidAdapter, match="can run code") as refused:
        imported(folder)
    run_advice(refused, folder)
    assert imported(folder).digest == expected.digest


def test_the_refusal_of_shards_says_how_to_join_them(folder: Path) -> None:
    expected = imported(folder)
    tensors = sorted(load_file(folder / WEIGHTS).items())
    for number in (1, 2):
        part = dict(tensors[number - 1 :: 2])
        save_file(part, folder / f"adapter_model-0000{number}-of-00002.safetensors")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InvalidAdapter, match="in 2 parts") as refused:
        imported(folder)
    run_advice(refused, folder)
    assert imported(folder).digest == expected.digest


# Copies of the base model's weights ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_the_embedding_is_left_out_and_a_trained_one_is_refused(
    dtype: torch.dtype, folder: Path
) -> None:
    base = tiny.pulled_base(folder.parent)
    rename_base(folder, base_model_name_or_path=base.name)
    weight = tiny.injection().model.model.embed_tokens.weight.detach().to(dtype).clone()
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, EMBEDDING: weight}, folder / WEIGHTS)
    stored = load_file(imported(folder, base=base).path / WEIGHTS)
    assert stored.keys() == tensors.keys()
    weight[3, 5] += 1
    save_file({**tensors, EMBEDDING: weight}, folder / WEIGHTS)
    with pytest.raises(InvalidAdapter, match=r"trained or resized.*merge_and_unload"):
        imported(folder, base=base)
