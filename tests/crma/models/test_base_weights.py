"""Single tensors of a pulled model."""

from pathlib import Path

import torch
from tiny import injection

from crma.models.base_model import BaseModel
from crma.models.base_weights import read_weight

NAMES = ["lm_head.weight", "model.embed_tokens.weight"]


def saved(folder: Path, **options: object) -> BaseModel:
    injection().model.save_pretrained(folder, **options)
    return BaseModel("tiny", "sha256:" + "a" * 64, folder, {})


def test_a_tensor_is_found_in_one_file_or_in_shards(tmp_path: Path) -> None:
    expected = injection().model.lm_head.weight
    for number, options in enumerate(({}, {"max_shard_size": "20KB"})):
        base = saved(tmp_path / str(number), **options)
        found = read_weight(base, NAMES)
        assert found is not None
        assert torch.equal(found, expected)
    assert (tmp_path / "1" / "model.safetensors.index.json").is_file()


def test_a_tied_weight_is_found_under_its_other_name(tmp_path: Path) -> None:
    base = saved(tmp_path)
    found = read_weight(base, ["absent.weight", NAMES[1]])
    assert found is not None
    assert torch.equal(found, injection().model.model.embed_tokens.weight)
    assert read_weight(base, ["absent.weight"]) is None
