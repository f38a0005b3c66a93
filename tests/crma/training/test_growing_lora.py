"""crma.training.growing_lora: earlier rows of O-LoRA stand still, and new ones avoid them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import injection, lora

from crma.core.errors import ConfigError
from crma.training.config import TrainConfig
from crma.training.growing_lora import grown_lora, overlap
from crma.training.protocol import Run

Make = Callable[..., Run]


def test_a_grown_lora_adds_what_both_add_and_only_the_new_rows_learn() -> None:
    old, new = (lora(injection(), rank, "attention", seed=rank) for rank in (2, 3))
    grown = grown_lora(old, new)
    assert (grown.config.rank, grown.config.scaling) == (5, 2.0)
    for path, pair in grown.pairs.items():
        x = torch.randn(4, pair.A.shape[1])
        torch.testing.assert_close(
            pair.delta(x), old.pairs[path].delta(x) + new.pairs[path].delta(x)
        )
        pair.delta(x).square().sum().backward()
        assert pair.A.grad is not None
        assert pair.B.grad is not None
        assert not pair.A.grad[:2].any()
        assert not pair.B.grad[:, :2].any()
        assert pair.A.grad[2:].all()


def test_the_overlap_is_the_sum_of_all_products_of_old_and_new_rows() -> None:
    old, new = (lora(injection(), rank, "first", seed=rank) for rank in (2, 3))
    grown = grown_lora(old, new)
    expected = sum(
        (old.pairs[path].A[i] @ new.pairs[path].A[j]).abs()
        for path in old.pairs
        for i in range(2)
        for j in range(3)
    )
    torch.testing.assert_close(overlap(grown, 3), expected)
    assert overlap(new, 3) == 0


def test_earlier_rows_keep_every_bit_and_the_newest_lora_serves_all_tasks(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path / "run", "O-LoRA", tasks=("first", "second", "third"))
    record = run.execute()
    loras = [run.snapshots.task(t).load() for t in range(3)]
    assert [each.config.rank for each in loras] == [2, 4, 6]
    for before, after in ((loras[0], loras[1]), (loras[1], loras[2])):
        for path, pair in before.pairs.items():
            rank = before.config.rank
            assert after.pairs[path].A[:rank].equal(pair.A)
            assert after.pairs[path].B[:, :rank].equal(pair.B)
            assert after.pairs[path].B[:, rank:].abs().max() > 0
    assert record["drift"][0] != 0
    last = run.snapshots.adapters_after(3, 0)
    assert last.digests == run.snapshots.adapters_after(3, 2).digests
    # The first task has nothing to avoid: it is that of NAIVE.
    naive = make(tmp_path / "naive", "NAIVE").execute()
    assert naive["digests"]["tasks"]["first"] == record["digests"]["tasks"]["first"]


def test_the_penalty_keeps_new_rows_away_from_old_ones(make: Make, tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 5.0):
        out = tmp_path / str(weight)
        run = make(out, "O-LoRA", lora={"orthogonality": weight, "rank": 2, "alpha": 4.0})
        run.execute()
        found.append(overlap(run.snapshots.task(1).load(), 2).item())
        log = (out / "work" / "second" / "log.jsonl").read_text().splitlines()
        assert json.loads(log[0])["loss"] > 0  # that of the answers, without the penalty
    assert found[1] < found[0]


def test_weight_decay_would_shrink_earlier_rows() -> None:
    with pytest.raises(ConfigError, match="needs weight_decay = 0"):
        TrainConfig.from_dict({"tasks": ["a"], "arm": "O-LoRA", "weight_decay": 0.1})
