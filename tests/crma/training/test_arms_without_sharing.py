"""Runs of the arms that share nothing, or learn everything in advance: what trains, what stays.

crma.training.protocol and snapshots, by the arms of crma.training.arms.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crma.core.errors import ConfigError
from crma.method.backbone import Backbone
from crma.method.lora import Lora
from crma.store.adapter_store import AdapterStore
from crma.training.arms import ARMS
from crma.training.initial_adapters import first_lora, new_backbone
from crma.training.loop import TaskTrainer
from crma.training.protocol import Run
from crma.training.shipping import check_shippable

THREE = ("first", "second", "third")
Make = Callable[..., Run]


def equal(one: Backbone, other: Backbone) -> bool:
    """Whether two backbones have the same parameters, bit for bit."""
    return all(value.equal(getattr(other, name)) for name, value in one.named_parameters())


def weights(lora: Lora, name: str) -> torch.Tensor:
    """All A or all B of a LoRA, in one vector."""
    return torch.cat([getattr(pair, name).flatten() for _, pair in sorted(lora.pairs.items())])


def tokens(folder: Path) -> int:
    """The tokens of a step log."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return sum(json.loads(line)["tokens"] for line in lines)


def test_a_private_backbone_is_new_for_every_task_and_serves_only_it(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path / "private", "PRIVATE", tasks=THREE)
    record = run.execute()
    assert record["drift"] == [0, 0, 0]
    assert len(set(record["digests"]["backbones"])) == 3
    for t in range(3):
        served = [run.snapshots.adapters_after(i, t) for i in range(t + 1, 4)]
        assert {each.digests for each in served} == {
            (run.snapshots.task(t).digest, record["digests"]["backbones"][t])
        }
    assert record["loss"][1][2] == record["loss"][0][2]  # not learned yet: the base model
    # The second backbone is what training on the second task alone would have made.
    alone = make(tmp_path / "alone", "PRIVATE", tasks=("second",))
    assert alone.execute()["digests"]["backbones"] == record["digests"]["backbones"][1:2]


def test_a_private_backbone_of_task_1_is_that_of_the_method(make: Make, tmp_path: Path) -> None:
    private = make(tmp_path / "private", "PRIVATE").execute()
    modular = make(tmp_path / "modular", "MODULAR").execute()
    assert private["digests"]["backbones"][0] == modular["digests"]["backbones"][0]
    assert private["loss"][1][0] == modular["loss"][1][0]


def test_an_oracle_learns_the_union_alone_and_stands_still_under_every_lora(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, "ORACLE", tasks=THREE)
    record = run.execute()
    assert record["drift"] == [0, 0, 0]
    assert len(set(record["digests"]["backbones"])) == 1
    first = run.snapshots.backbone_after(1).load()
    assert not equal(first, new_backbone(run.config, run.injection))
    log = tmp_path / "work" / "first"
    rows = [row for rows in run.train_rows.values() for row in rows]
    in_epoch = sum(len(row.prompt) + len(row.answer) - 1 for row in rows)
    assert tokens(log / "pretraining") == 2 * in_epoch
    assert not (tmp_path / "work" / "second" / "pretraining").exists()
    pretraining = (log / "pretraining" / "log.jsonl").read_text().splitlines()
    assert {*json.loads(pretraining[0])["grad_norm"]} == {"S", "R", "W", "gamma"}  # no LoRA
    later = json.loads((log / "log.jsonl").read_text().splitlines()[0])
    assert {*later["grad_norm"]} == {"lora"}
    assert record["steps"] == 2 * 3 * 12  # all of it is in the record
    assert set(run.snapshots.backbone_after(1).manifest.trained_on.data) >= {
        f"{task}/train" for task in THREE
    }


def test_an_oracle_that_leaves_a_task_out_never_sees_it(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, "ORACLE-loo", tasks=THREE)
    record = run.execute()
    assert record["drift"] == [0, 0, 0]
    assert len(set(record["digests"]["backbones"])) == 3
    for t, task in enumerate(THREE):
        entry = run.snapshots.backbone_after(t + 1)
        learned = {name.partition("/")[0] for name in entry.manifest.trained_on.data}
        assert learned == set(THREE) - {task}
        others = [rows for path, rows in run.train_rows.items() if Path(path).name != task]
        in_epoch = sum(len(row.prompt) + len(row.answer) - 1 for rows in others for row in rows)
        assert tokens(tmp_path / "work" / task / "pretraining") == 2 * in_epoch
    assert AdapterStore(tmp_path / "store").verify() == []


def test_a_killed_oracle_resumes_and_ends_with_the_same_result(make: Make, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", "ORACLE-loo").execute()
    calls = 0
    step = TaskTrainer.check_mixing_gradient

    def dying(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:  # in the second task's pretraining: it follows 12 + 12 steps
            raise KeyboardInterrupt
        step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "check_mixing_gradient", dying)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "killed", "ORACLE-loo").execute()
    again = make(tmp_path / "killed", "ORACLE-loo").execute()
    for key in ("digests", "loss", "steps", "items"):
        assert again[key] == whole[key]


def test_a_warm_lora_starts_at_the_last_one_and_leaves_it_as_it_was(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path / "warm", "FROZEN-warm-last", tasks=THREE)
    record = run.execute()
    assert record["drift"] == [0, 0, 0]
    before = run.snapshots.task(1).load()
    start = run.stage_trainer.start_lora(2)
    for name in ("A", "B"):
        assert weights(start, name).equal(weights(before, name).float())
    assert all(parameter.requires_grad for parameter in start.parameters())
    # Task 1 has none before it: it is that of FROZEN.
    frozen = make(tmp_path / "frozen", "FROZEN", tasks=THREE).execute()
    assert record["digests"]["tasks"]["first"] == frozen["digests"]["tasks"]["first"]
    assert record["digests"]["tasks"]["second"] != frozen["digests"]["tasks"]["second"]


def test_a_warm_mean_has_one_a_and_starts_at_the_mean_of_all_earlier_b(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, "FROZEN-warm-mean", tasks=THREE)
    record = run.execute()
    assert record["drift"] == [0, 0, 0]
    loras = [run.snapshots.task(t).load() for t in range(3)]
    A = [weights(lora, "A") for lora in loras]
    assert A[0].equal(A[1])
    assert A[0].equal(A[2])
    drawn = weights(first_lora(run.config, run.injection, "first"), "A")
    assert not A[0].float().equal(drawn.bfloat16().float())  # it trained on task 1
    start = run.stage_trainer.start_lora(2)
    B = torch.stack([weights(lora, "B").float() for lora in loras[:2]])
    assert weights(start, "B").equal(B.mean(0))
    assert not weights(loras[2], "B").equal(weights(loras[1], "B"))
    assert {pair.A.requires_grad for pair in start.pairs.values()} == {False}
    assert {pair.B.requires_grad for pair in start.pairs.values()} == {True}


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.private])
def test_what_no_store_can_serve_is_not_shipped(arm: Any) -> None:
    with pytest.raises(ConfigError, match="a backbone for each task") as caught:
        check_shippable(arm)
    assert "MODULAR" in caught.value.allowed
    assert arm.name not in caught.value.allowed
