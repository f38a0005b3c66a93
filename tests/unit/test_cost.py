"""crma.cost: what is counted without weights is what a run has and does."""

from pathlib import Path
from typing import Any

import pytest
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from crma.config import TrainConfig
from crma.cost import estimate
from crma.evaluate import collate
from crma.protocol import Run
from crma.pull import BaseModel
from crma.train import AdaptedModel, epoch_batches


@pytest.mark.parametrize("arm", ["MODULAR", "FROZEN-matched", "free-M"])
def test_an_estimate_counts_what_a_real_step_does(arm: Any, base: BaseModel, write_task: Any, tmp_path: Path) -> None:
    write_task(tmp_path / "task", ("yes", "no"))
    values = {"tasks": [str(tmp_path / "task")], "arm": arm, "model": str(base.path), "dtype": "float32"}
    config = TrainConfig.from_dict(values | {"epochs": 1, "batch_size": 12})
    found = estimate(config, flops=1.0)
    run = Run(config, base, tmp_path / "run", lambda *_: None)
    adapted = AdaptedModel(run.injection, run._start_lora(0, "task"), run._start_backbone(0), backbone_moves=True)
    trained, frozen = list(adapted.parameters()), list(run.model.parameters())
    assert found["trained_parameters"] == sum(p.numel() for p in trained)
    assert found["parameters"] == sum(p.numel() for p in frozen)

    [rows] = run.train_rows.values()
    [indices] = epoch_batches(rows, 12, f"0/{config.tasks[0]}/0")
    batch, kept = collate([rows[i] for i in indices], 0), {}
    keep: Any = lambda t: (kept.setdefault(t.untyped_storage().data_ptr(), t), t)[1]  # noqa: E731
    with saved_tensors_hooks(keep, lambda t: t), FlopCounterMode(display=False) as counter:
        adapted(batch).backward()
    own = {p.data_ptr() for p in [*trained, *frozen]}
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert found["gigabytes"]["activations"] * 1e9 == pytest.approx(real, rel=0.05)
    assert found["flops"] == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert (found["steps"], found["tokens"]) == (1, batch.input_ids.numel())
