"""Single tensors of a pulled model."""

from pathlib import Path

import torch
from tiny import injection

from crma.models.base_model import BaseModel
from crma.models.base_weights import weights_of_shape


def test_the_tensors_of_a_shape_are_found_in_one_file_or_in_shards(tmp_path: Path) -> None:
    """The embedding and the head; GPT-NeoX's head has another name in the file."""
    for family in ("llama", "gpt_neox"):
        model = injection(family).model
        expected = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        for shard in ("1GB", "20KB"):
            folder = tmp_path / family / shard
            model.save_pretrained(folder, max_shard_size=shard)
            base = BaseModel("tiny", "sha256:" + "a" * 64, folder, {})
            found = list(weights_of_shape(base, (300, 32)))
            assert len(found) == 2
            for weight in expected:
                assert any(torch.equal(weight, each) for each in found)
            assert list(weights_of_shape(base, (300, 31))) == []
    assert len(list((tmp_path / "llama" / "20KB").glob("*.safetensors"))) > 1
