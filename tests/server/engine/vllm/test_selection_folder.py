"""server.engine.vllm.selection_folder"""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from crma.method.lora import Lora
from server.engine.native.adapter_weights import prepare
from server.engine.vllm.selection_folder import write_folder


def test_a_folder_has_the_deltas_of_the_task_and_of_the_backbone_at_one_rank(
    tmp_path: Path,
) -> None:
    inj = tiny.injection()
    known = tiny.adapters(inj)
    lora, backbone = prepare(known["task-1"], inj), prepare(known["crma-0"], inj)
    assert isinstance(lora, Lora)
    assert isinstance(backbone, list)
    write_folder(tmp_path / "both", lora, backbone, "model.layers")

    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "both" / "adapter_model.safetensors")
    rank = config["r"]
    assert rank == 5, "the larger of the two"
    assert config["lora_alpha"] == rank
    assert {A.shape[0] for name, A in tensors.items() if "lora_A" in name} == {rank}
    wanted = {path: pair.scaled_b @ pair.A for path, pair in lora.pairs.items()}
    for index, pair in enumerate(backbone):
        wanted[f"model.layers.{index}.crma_tap"] = pair.B @ pair.A
    found = {}
    for name, A in tensors.items():
        path, _, rest = name.removeprefix("base_model.model.").partition(".lora_A")
        if rest:
            found[path] = tensors[name.replace("lora_A", "lora_B")] @ A
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        torch.testing.assert_close(found[path], delta)
    assert "crma_tap" in config["target_modules"]


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    inj = tiny.injection()
    backbone = prepare(tiny.adapters(inj)["crma-0"], inj)
    assert isinstance(backbone, list)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(OSError, match="there"):
        write_folder(tmp_path / "there", None, backbone, "model.layers")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
