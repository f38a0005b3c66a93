"""crma.training.experiment: the runs that a file plans, and records that are made only once."""

import json
from pathlib import Path
from typing import Any

import pytest
from paths import EXPERIMENTS

from crma.core.digests import file_digest
from crma.core.errors import ConfigError, TrainingError
from crma.models.base_model import BaseModel
from crma.training.config import TrainConfig
from crma.training.endpoint import read_endpoint
from crma.training.experiment import Experiment, execute, plan, read_experiment
from crma.training.experiment_report import experiment_report
from crma.training.study import read_study


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
        elif path.name == "endpoint.toml":
            assert read_endpoint(path)
        elif "[[phases]]" in path.read_text():
            assert read_study(path)
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


ORDERS = [["a", "b"], ["b", "a"]]


def test_all_arms_of_a_seed_have_the_order_of_that_seed() -> None:
    runs = [{"arm": "FROZEN", "seeds": [4, 5, 6]}, {"arm": "NAIVE", "seeds": [5]}]
    planned = experiment(orders=ORDERS, runs=runs, arms={}, config={}).planned()
    orders = {name: config.tasks for name, config in planned.items()}
    assert orders == {
        "FROZEN-seed4": ("a", "b"),
        "FROZEN-seed5": ("b", "a"),
        "FROZEN-seed6": ("a", "b"),
        "NAIVE-seed5": ("b", "a"),
    }


ENDPOINT = """
name = "small"
arm = "FROZEN"
against = ["NAIVE"]
measure = "holdout"
seeds = [0, 1]
orders = [["first", "second"]]
alpha = 0.05
drift_margin = 0.5
worst_drift = 1.0
"""


def test_the_reserve_is_asked_only_for_an_endpoint() -> None:
    asked = {"tasks": ["a"], "measure": "holdout+reserve"}
    with pytest.raises(ConfigError, match="written down before") as caught:
        experiment(config=asked).planned()
    assert caught.value.field == "endpoint"
    with pytest.raises(ConfigError, match="written down before"):
        experiment(config=asked, endpoint="endpoint.toml", report="regime").planned()
    assert experiment(config=asked, endpoint="endpoint.toml", report="endpoint").planned()


def test_a_record_holds_the_digest_of_the_endpoint_that_was_there_before(
    base: BaseModel, write_task: Any, tmp_path: Path
) -> None:
    write_task(tmp_path / "first", ("yes", "no"))
    (tmp_path / "endpoint.toml").write_text(ENDPOINT)
    (tmp_path / "try.toml").write_text(
        'name = "try"\nendpoint = "endpoint.toml"\nreport = "endpoint"\n'
        f'[config]\ntasks = ["{tmp_path / "first"}"]\n'
        f'model = "{base.path}"\ndtype = "float32"\nepochs = 1\nbatch_size = 5\n'
        '[[runs]]\narm = "FROZEN"\nseeds = [0]\n'
    )
    read = read_experiment(tmp_path / "try.toml")
    results, work = tmp_path / "results", tmp_path / "work"
    (path,) = execute(read, results, work, only="*", report=lambda *_: None)
    digest = file_digest(tmp_path / "endpoint.toml")
    assert json.loads(path.read_text())["endpoint"] == digest
    records = {path.stem: json.loads(path.read_text())}
    # Nobody looks before all runs are there: no table of arms either.
    text = experiment_report(read, records)
    assert text == "Endpoint small: 3 runs are missing, first FROZEN 1."
    path.write_text(json.dumps(records[path.stem] | {"endpoint": "sha256:another"}))
    with pytest.raises(TrainingError, match="under another one") as caught:
        plan(read, results, only="*")
    assert caught.value.field == "endpoint"


def test_a_plan_names_the_runs_without_a_record(tmp_path: Path) -> None:
    runs = plan(experiment(), tmp_path, only="FROZEN-*")
    assert (len(runs.configs), runs.missing) == (3, ["FROZEN-seed0", "FROZEN-seed1"])
    assert not list(tmp_path.iterdir())


MADE_BEFORE = {"quick", "full", "search", "choose"}  # their records say "auto"


def test_every_comparison_yet_to_be_made_pins_its_dtype() -> None:
    """`auto` follows the processor, so records of two machines were no pair."""
    for path in EXPERIMENTS.glob("*.toml"):
        if path.stem not in MADE_BEFORE and "[[runs]]" in path.read_text():
            dtypes = {config.dtype for config in read_experiment(path).planned().values()}
            assert dtypes == {"bfloat16"}, path.name
