"""crma.training.experiment: what a file plans, and records that are made once, in processes of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from paths import EXPERIMENTS

from crma.core.errors import ConfigError, TrainingError
from crma.models.base_model import BaseModel
from crma.training.config import TrainConfig
from crma.training.experiment import Experiment, execute, read_experiment
from crma.training.tables import arms_table


def planned(**changes: Any) -> Experiment:
    runs = [
        {"arm": "FROZEN", "seeds": [0, 1]},
        {"arm": "NAIVE", "seeds": [0], "label": "one", "changes": {"epochs": 2}},
    ]
    values = {"name": "try", "config": {"tasks": ["a"], "epochs": 1}, "runs": runs}
    return Experiment.model_validate(
        values | {"arms": {"NAIVE": {"lora": {"lr": 1.0, "rank": 3}}}} | changes
    )


def test_a_run_is_the_shared_table_then_its_arm_then_its_own_changes() -> None:
    found = planned(config={"tasks": ["a"], "lora": {"rank": 5, "alpha": 7.0}}).planned()
    assert list(found) == ["FROZEN-seed0", "FROZEN-seed1", "one-seed0"]
    one = found["one-seed0"]
    assert (one.arm, one.seed, one.epochs, one.lora.lr, one.lora.rank, one.lora.alpha) == (
        "NAIVE",
        0,
        2,
        1.0,
        3,
        7.0,
    )


def test_a_name_that_comes_twice_or_a_key_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two runs have one name"):
        planned(runs=2 * [{"arm": "FROZEN", "seeds": [0]}]).planned()
    (tmp_path / "odd.toml").write_text('name = "x"\nseed = 3\n')
    with pytest.raises(ConfigError) as caught:
        read_experiment(tmp_path / "odd.toml")
    assert caught.value.field == "config"


def test_the_experiments_that_ship_can_be_read() -> None:
    files = list(EXPERIMENTS.glob("*.toml"))
    assert files
    for path in files:
        assert (
            read_experiment(path).planned()
            if "[[runs]]" in path.read_text()
            else TrainConfig.read(path)
        )


def test_the_table_pairs_each_run_with_its_control_at_the_same_seed() -> None:
    measured = {"ACC": 0.5, "BWT": -0.1, "FWT": 0.0}

    def record(seed: int, loss: float, drift: float) -> dict[str, Any]:
        return {
            "seed": seed,
            "mean_loss": loss,
            "mean_drift": drift,
            "drift": [drift, drift + 1, 0],
            **measured,
        }

    records = {f"FROZEN-matched-seed{seed}": record(seed, 1.0 + seed, 0.0) for seed in (0, 1)}
    records |= {"MODULAR-seed0": record(0, 0.9, 0.1), "MODULAR-seed1": record(1, 1.6, 0.3)}
    records["alone-seed2"] = record(2, 0.9, 0.1) | {"mean_drift": None, "BWT": None}
    _, _, control, modular, alone = arms_table(records).splitlines()
    assert "| +0.0 [+0.0, +0.0]<br>(+0.0, +0.0) |" in control
    assert "| 0, 1 | +0.20 [-1.07, +1.47]<br>(+0.10, +0.30) | +1.30 | 0.1 |" in modular
    assert "(+10.0, +20.0) | 0.500 [" in modular
    assert "| 2 | – | – | – | 0.9000 | – | 0.500 | – | 0.000 |" in alone


def test_a_record_is_made_once_and_only_by_its_own_configuration(
    base: BaseModel, write_task: Any, tmp_path: Path
) -> None:
    for task, answers in {"first": ("yes", "no"), "second": ("up", "down")}.items():
        write_task(tmp_path / task, answers)
    config = {
        "tasks": [str(tmp_path / t) for t in ("first", "second")],
        "model": str(base.path),
        "dtype": "float32",
    }
    config |= {"epochs": 1, "batch_size": 5}
    told: list[Any] = []

    def run(only: str = "*", **changes: Any) -> list[str]:
        trial = planned(config=config | changes)
        results, work = tmp_path / "results", tmp_path / "work"
        return [
            path.stem
            for path in execute(
                trial, results, work, only=only, report=lambda *item: told.append(item)
            )
        ]

    assert run(only="*-seed1") == ["FROZEN-seed1"]
    assert run() == ["FROZEN-seed0", "FROZEN-seed1", "one-seed0"]
    assert (
        json.loads((tmp_path / "results" / "try" / "one-seed0.json").read_text())["config"]["lora"][
            "rank"
        ]
        == 3
    )
    assert ("try", 1, 2) in told
    told.clear()
    assert len(run()) == 3
    assert not told
    with pytest.raises(TrainingError, match="made with another configuration"):
        run(epochs=2)
