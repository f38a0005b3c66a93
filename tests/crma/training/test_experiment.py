"""crma.training.experiment: the runs that a file plans, and records that are made only once."""

import json
from pathlib import Path
from typing import Any

import pytest
from paths import EXPERIMENTS

from crma.core.errors import ConfigError, TrainingError
from crma.models.base_model import BaseModel
from crma.training.config import TrainConfig
from crma.training.experiment import Experiment, execute, read_experiment


def experiment(**changes: Any) -> Experiment:
    """Two FROZEN runs, and a NAIVE run with a label; `changes` replace keys of the file."""
    values = {
        "name": "try",
        "config": {"tasks": ["a"], "epochs": 1},
        "arms": {"NAIVE": {"lora": {"lr": 1.0, "rank": 3}}},
        "runs": [
            {"arm": "FROZEN", "seeds": [0, 1]},
            {"arm": "NAIVE", "seeds": [0], "label": "one", "changes": {"epochs": 2}},
        ],
    }
    return Experiment.model_validate(values | changes)


def test_a_run_merges_the_shared_table_its_arms_table_and_its_own_changes() -> None:
    shared = {"tasks": ["a"], "lora": {"rank": 5, "alpha": 7.0}}
    planned = experiment(config=shared).planned()
    assert list(planned) == ["FROZEN-seed0", "FROZEN-seed1", "one-seed0"]
    one = planned["one-seed0"]
    assert (one.arm, one.seed, one.epochs) == ("NAIVE", 0, 2)
    assert (one.lora.lr, one.lora.rank, one.lora.alpha) == (1.0, 3, 7.0)


def test_two_runs_with_the_same_name_are_refused() -> None:
    runs = 2 * [{"arm": "FROZEN", "seeds": [0]}]
    with pytest.raises(ConfigError, match="two runs have the same name"):
        experiment(runs=runs).planned()


def test_a_file_without_its_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text('name = "x"\nseed = 3\n')
    with pytest.raises(ConfigError) as caught:
        read_experiment(tmp_path / "odd.toml")
    assert caught.value.field == "config"


def test_the_shipped_experiments_can_be_read() -> None:
    files = list(EXPERIMENTS.glob("*.toml"))
    assert files
    for path in files:
        if "[[runs]]" in path.read_text():
            assert read_experiment(path).planned()
        else:
            assert TrainConfig.read(path)


def test_a_record_is_made_once_and_only_for_its_own_configuration(
    base: BaseModel, write_task: Any, tmp_path: Path
) -> None:
    write_task(tmp_path / "first", ("yes", "no"))
    write_task(tmp_path / "second", ("up", "down"))
    config = {
        "tasks": [str(tmp_path / task) for task in ("first", "second")],
        "model": str(base.path),
        "dtype": "float32",
        "epochs": 1,
        "batch_size": 5,
    }
    reports: list[tuple[str, int, int]] = []

    def run(only: str = "*", **changes: Any) -> list[str]:
        """The names of the records that exist after executing the experiment."""
        paths = execute(
            experiment(config=config | changes),
            tmp_path / "results",
            tmp_path / "work",
            only=only,
            report=lambda *report: reports.append(report),
        )
        return [path.stem for path in paths]

    assert run(only="*-seed1") == ["FROZEN-seed1"]
    assert run() == ["FROZEN-seed0", "FROZEN-seed1", "one-seed0"]
    record = json.loads((tmp_path / "results" / "try" / "one-seed0.json").read_text())
    assert record["config"]["lora"]["rank"] == 3
    assert ("try", 1, 2) in reports
    reports.clear()
    assert len(run()) == 3
    assert not reports
    with pytest.raises(TrainingError, match="made with another configuration"):
        run(epochs=2)
