"""crma.method.lora: the formula, and how a new LoRA starts.

Mixed batches are tested in tests/numerics.
"""

import pytest
import torch

from crma.core.errors import ConfigError
from crma.method.lora import LoraConfig, LoraPair, add_grouped, new_lora

SHAPES = {
    f"layers.{i}.{name}": (6, 8) for i in range(2) for name in ("q_proj", "v_proj", "up_proj")
}


def test_a_pair_adds_the_scaled_low_rank_product() -> None:
    pair = LoraPair(torch.randn(3, 8), torch.randn(6, 3), 2.0 / 3)
    x = torch.randn(2, 5, 8)
    y = torch.randn(2, 5, 6)
    delta = x @ (pair.scaling * pair.B @ pair.A).mT
    torch.testing.assert_close(pair.delta(x), delta)
    assert pair.delta(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(add_grouped(y, x, [(None, pair)]), y + delta)
    one_row = add_grouped(y, x, [(torch.tensor([1]), pair)])
    assert torch.equal(one_row[0], y[0])
    torch.testing.assert_close(one_row[1], y[1] + delta[1])  # y itself has not changed
    assert add_grouped(y, x, []) is y


def test_a_new_lora_adds_exactly_zero_and_the_same_seed_gives_the_same_lora() -> None:
    config = LoraConfig(4, 8.0, ("q_proj", "up_proj"))
    lora = new_lora(config, SHAPES, torch.Generator().manual_seed(3))
    again = new_lora(config, SHAPES, torch.Generator().manual_seed(3))
    assert set(lora.pairs) == {path for path in SHAPES if not path.endswith("v_proj")}
    assert all(pair.A.shape[0] == 4 for pair in lora.pairs.values())
    for path, pair in lora.pairs.items():
        assert torch.count_nonzero(pair.delta(torch.randn(2, 8))) == 0
        assert torch.equal(pair.A, again.pairs[path].A)
        assert 0.5 / 8**0.5 < pair.A.abs().max() <= 1 / 8**0.5
        assert pair.scaling == 2.0
    trainable = lora.to("cpu", torch.bfloat16).trainable().parameters()
    assert {(p.dtype, p.requires_grad) for p in trainable} == {(torch.float32, True)}


def test_an_invalid_rank_or_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="'o_proj' matches no linear"):
        new_lora(LoraConfig(4, 8.0, ("q_proj", "o_proj")), SHAPES, torch.Generator())
    with pytest.raises(ConfigError, check=lambda error: error.field == "rank"):
        LoraConfig(0, 8.0, ("q_proj",))
    with pytest.raises(ConfigError, check=lambda error: error.field == "target_modules"):
        LoraConfig(4, 8.0, ())


def test_loras_of_different_ranks_begin_with_the_same_rows_if_drawn_at_one_rank() -> None:
    loras = []
    for rank in (2, 5):
        config = LoraConfig(rank, 2.0 * rank, ("q_proj", "up_proj"))
        loras.append(new_lora(config, SHAPES, torch.Generator().manual_seed(3), drawn_rank=5))
    small, large = loras
    for path, pair in small.pairs.items():
        assert torch.equal(pair.A, large.pairs[path].A[:2])
        assert pair.A.is_leaf
        assert pair.A.untyped_storage().nbytes() == 2 * 8 * 4  # not a view of the larger draw
    with pytest.raises(ConfigError, match="smaller rank"):
        new_lora(config, SHAPES, torch.Generator(), drawn_rank=4)
