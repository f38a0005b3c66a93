"""crma.lora: the formula, and the same result row by row or grouped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crma.errors import ConfigError
from crma.lora import LoraConfig, LoraPair, add_grouped, new_lora

SHAPES = {f"layers.{i}.{name}": (6, 8) for i in range(2) for name in ("q_proj", "v_proj", "up_proj")}
PAIRS = [LoraPair(torch.randn(r, 8), torch.randn(6, r), 2.0 / r) for r in (1, 3, 4)]


def test_a_pair_adds_the_scaled_low_rank_product() -> None:
    pair, x, y = PAIRS[1], torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    delta = x @ (pair.scaling * pair.B @ pair.A).mT
    torch.testing.assert_close(pair.delta(x), delta)
    assert pair.delta(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(add_grouped(y, x, [(None, pair)]), y + delta)
    assert add_grouped(y, x, []) is y


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=7))
def test_any_mix_of_rows_gets_what_each_row_gets_alone(chosen: list[int | None]) -> None:
    x, y = torch.randn(len(chosen), 3, 8), torch.randn(len(chosen), 3, 6)
    rows = {c: [i for i, other in enumerate(chosen) if other == c] for c in chosen}
    before = y.clone()
    result = add_grouped(y, x, [(torch.tensor(rows[c]), PAIRS[c]) for c in rows if c is not None])
    for i, c in enumerate(chosen):
        if c is None:
            assert torch.equal(result[i], y[i])
        else:
            torch.testing.assert_close(result[i], y[i] + PAIRS[c].delta(x[i]), atol=1e-5, rtol=1e-5)
    assert torch.equal(y, before)


def test_a_new_lora_adds_exactly_nothing_and_is_the_same_for_the_same_seed() -> None:
    config = LoraConfig(4, 8.0, ("q_proj", "up_proj"))
    lora, again = (new_lora(config, SHAPES, torch.Generator().manual_seed(3)) for _ in range(2))
    assert set(lora.pairs) == {path for path in SHAPES if not path.endswith("v_proj")}
    assert all(pair.A.shape[0] == 4 for pair in lora.pairs.values())
    for path, pair in lora.pairs.items():
        assert torch.count_nonzero(pair.delta(torch.randn(2, 8))) == 0
        assert torch.equal(pair.A, again.pairs[path].A)
        assert 0.5 / 8**0.5 < pair.A.abs().max() <= 1 / 8**0.5
        assert pair.scaling == 2.0
    trainable = lora.to("cpu", torch.bfloat16).trainable().parameters()
    assert {(p.dtype, p.requires_grad) for p in trainable} == {(torch.float32, True)}


def test_what_cannot_be_a_lora_is_refused() -> None:
    with pytest.raises(ConfigError, match="'o_proj' matches no linear"):
        new_lora(LoraConfig(4, 8.0, ("q_proj", "o_proj")), SHAPES, torch.Generator())
    for rank, targets, field in ((0, ("q_proj",), "rank"), (4, (), "target")):
        with pytest.raises(ConfigError, match=field):
            LoraConfig(rank, 8.0, targets)
