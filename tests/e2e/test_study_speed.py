"""`crma study --speed`: joint steps a second, by processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import crma
from small_study import write_small_study

from crma.core.errors import TrainingError
from crma.models.base_model import BaseModel
from crma.training.config import TrainConfig
from crma.training.study_speed import speeds

pytestmark = pytest.mark.e2e


def test_the_command_measures_and_trains_nothing(
    base: BaseModel, write_task: Callable[..., None], tmp_path: Path
) -> None:
    file = write_small_study(tmp_path, base, write_task)
    folders = ("--results", tmp_path / "results", "--work", tmp_path / "work")
    options = ("--speed", "--workers", 2, "--together", 2, "--json")
    code, out, err = crma("study", file, *folders, *options)
    assert code == 0, err
    found = json.loads(out)
    assert [(each["workers"], each["graphs"]) for each in found["speeds"]] == [
        (1, False),
        (2, False),
    ]
    assert all(each["steps_per_s"] > 0 for each in found["speeds"])
    assert found["fastest"] in found["speeds"]
    assert not (tmp_path / "results").exists()


def test_a_process_that_fails_ends_the_measuring_of_all(base: BaseModel, tmp_path: Path) -> None:
    config = TrainConfig(tasks=(str(tmp_path / "absent"),), model=str(base.path), dtype="float32")
    with pytest.raises(TrainingError, match="failed"):
        speeds(config, together=2, workers=(2,), seconds=0.1)
