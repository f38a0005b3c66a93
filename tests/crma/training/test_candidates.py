"""Arms whose backbone goes on learning carefully: SLOW-FAST and NULL-SPACE.

crma.training.stage_trainer and protected_span.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import backbone, injection, lora

from crma.evaluation.evaluator import Encoded, collate
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Plan
from crma.training.protected_span import (
    free_directions,
    save_moments,
    second_moments,
    sum_of_moments,
)
from crma.training.protocol import Run
from crma.training.stage_trainer import MOMENTS_FILE

THREE = ("first", "second", "third")
Make = Callable[..., Run]


def steps_of(folder: Path) -> list[set[str]]:
    """What trained in each step of a log."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [set(json.loads(line)["grad_norm"]) for line in lines]


def parameters(made: Backbone) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in made.parameters()])


def test_a_slow_backbone_goes_a_part_of_the_way_and_the_lora_settles_under_it(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path / "slow", "SLOW-FAST", tasks=THREE)
    record = run.execute()
    work = tmp_path / "slow" / "work"
    for task in THREE:
        together, alone = steps_of(work / task), steps_of(work / task / "settled")
        assert (len(together), len(alone)) == (6, 6)  # half of the epochs each
        assert together[0] == {"lora", "S", "R", "W", "gamma"}
        assert alone[0] == {"lora"}
    assert record["steps"] == 3 * 12  # as many as any other arm
    assert len(set(record["digests"]["backbones"])) == 3
    assert record["drift"][2] == 0
    # After task 1 the backbone is the fast one: that of a run of half the epochs.
    short = make(tmp_path / "short", "MODULAR", tasks=("first",), epochs=1)
    assert short.execute()["digests"]["backbones"] == record["digests"]["backbones"][:1]


def test_a_slow_backbone_moves_by_one_part_in_t(make: Make, tmp_path: Path) -> None:
    """Task 2 goes half of the way that MODULAR goes at full rates, from the same start."""
    slow = make(tmp_path / "slow", "SLOW-FAST")
    slow.execute()
    before, after = (slow.snapshots.backbone_after(i).load() for i in (1, 2))
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(
            "crma.training.stage_trainer.blend",
            lambda old, new, weight: kept.append((old, new, weight)) or new,
        )
        make(tmp_path / "kept", "SLOW-FAST").execute()
    ((old, fast, weight),) = kept
    assert weight == 0.5
    assert parameters(old).equal(parameters(before))
    torch.testing.assert_close(
        parameters(after), (parameters(before) + parameters(fast)) / 2, rtol=1e-6, atol=1e-7
    )


def test_a_protecting_backbone_moves_only_r_and_only_in_free_directions(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, "NULL-SPACE", tasks=THREE, crma={"later_scale": 1.0})
    run.execute()
    work = tmp_path / "work"
    assert steps_of(work / "first")[0] == {"lora", "S", "R", "W", "gamma"}
    assert steps_of(work / "second")[0] == steps_of(work / "third")[0] == {"lora", "R"}
    versions = [run.snapshots.backbone_after(i).load() for i in (1, 2, 3)]
    for t in (1, 2):
        before, after = versions[t - 1], versions[t]
        for name in ("S", "W", "gamma"):
            assert getattr(after, name).equal(getattr(before, name))
        moved = (after.R - before.R).detach()
        assert moved.abs().max() > 1e-5
        moments = sum_of_moments(work / task / MOMENTS_FILE for task in THREE[:t])
        assert moments is not None
        protected = torch.eye(moments.shape[-1]) - free_directions(moments)
        assert (moved @ protected).abs().max() < 1e-5 * max(1.0, moved.abs().max().item())


def test_the_free_directions_are_those_outside_the_span_with_its_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    span = torch.linalg.qr(torch.randn(2, 8, 3, generator=generator)).Q
    large = torch.diag(torch.tensor([5.0, 2.0, 1.0]))
    faint = 1e-4 * torch.eye(8)
    free = free_directions(span @ large @ span.mT + faint, energy=0.99)
    torch.testing.assert_close(free, torch.eye(8) - span @ span.mT, rtol=0, atol=1e-5)
    # The two largest hold 7 / 8 of the energy: enough for less.
    free = free_directions(span @ large @ span.mT, energy=0.8)
    assert torch.linalg.matrix_rank(free[0]) == 6
    torch.testing.assert_close(free @ free, free, rtol=0, atol=1e-5)
    assert free_directions(torch.zeros(1, 4, 4)).equal(torch.eye(4)[None])


def test_moments_are_of_real_positions_and_of_what_the_backbone_reads(tmp_path: Path) -> None:
    """Padding does not count, and batches do not matter."""
    inj = injection()
    rows = [Encoded([5, 9, 40], [7, 1]), Encoded([11], [1]), Encoded([3, 8, 2, 6, 90], [4, 1])]
    task, shared = lora(inj, 2, "attention"), backbone(inj)
    found = second_moments(inj, task, shared, rows, 0)
    read: list[torch.Tensor] = []

    class Listening(FoldedPair):
        def delta(self, h: torch.Tensor) -> torch.Tensor:
            read.append(h[0])
            return super().delta(h)

    pairs = [Listening(*pair) for pair in shared.folded("cpu", torch.float32)]
    expected = torch.zeros_like(found)
    for row in rows:
        read.clear()
        batch = collate([row], 0)
        with torch.inference_mode(), inj.active(Plan([(None, task)], [(None, pairs)])):
            inj.model(input_ids=batch.input_ids)
        for layer, h in enumerate(read):
            unit = h / h.norm(dim=-1, keepdim=True)
            expected[layer] += unit.mT @ unit
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    num_positions = sum(len(row.prompt) + len(row.answer) - 1 for row in rows)
    traces = found.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(traces, torch.full((2,), float(num_positions)))
    save_moments(tmp_path / "a", found)
    save_moments(tmp_path / "b", found)
    assert sum_of_moments([]) is None
    torch.testing.assert_close(sum_of_moments([tmp_path / "a", tmp_path / "b"]), 2 * found)
