"""crma.training.cost: how many examples a run trains on, and how long that takes here."""

import json
from pathlib import Path

import pytest

from crma.core.provenance import hardware
from crma.training.config import TrainConfig
from crma.training.cost import estimate, num_examples


def config(arm: str = "MODULAR", **changes: object) -> TrainConfig:
    values = {"tasks": ["a", "b", "c"], "arm": arm, "train_items": 10, "epochs": 2, **changes}
    return TrainConfig.from_dict(values)


def test_pretraining_counts_as_often_as_it_is_done() -> None:
    assert num_examples(config()) == 60
    assert num_examples(config("ORACLE")) == 120
    assert num_examples(config("ORACLE-loo")) == 60 + 2 * 60  # each task is in two of the others


def test_whole_splits_are_counted(data: Path) -> None:
    assert num_examples(config(tasks=[str(data / "first")], train_items=0)) == 2 * 12


def test_records_of_this_class_of_machine_say_how_long_it_takes(tmp_path: Path) -> None:
    assert estimate([config()], tmp_path) == (60, None, "")
    here, other = hardware(), hardware() | {"cpu": "another", "gpu": None}
    made = {
        "slow-seed0": (here, 16, 120.0),
        "slow-seed1": (here, 16, 180.0),
        "small-seed0": (here, 4, 600.0),
        **{f"other-seed{seed}": (other, 16, 6.0) for seed in range(4)},
    }
    (tmp_path / "done").mkdir()
    for name, (machine, batch_size, wall_s) in made.items():
        settings = config(batch_size=batch_size).model_dump(mode="json")
        record = {"hardware": machine, "config": settings, "wall_s": wall_s}
        (tmp_path / "done" / f"{name}.json").write_text(json.dumps(record))
    found = estimate([config(), config("ORACLE", batch_size=4)], tmp_path)
    assert found.examples == 180
    assert found.seconds == pytest.approx(60 * 2.5 + 120 * 10)
    assert estimate([config(batch_size=8)], tmp_path).seconds == pytest.approx(60 * 3)
    for path in (tmp_path / "done").glob("s*"):
        path.unlink()
    # No record of this machine is left: those of another are named.
    assert estimate([config()], tmp_path) == (60, pytest.approx(6), "another")
