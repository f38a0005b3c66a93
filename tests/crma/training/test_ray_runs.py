"""crma.training.ray_runs: tests/e2e/test_ray.py runs an experiment on a cluster."""

import sys
from pathlib import Path

import pytest

from crma.core.errors import ConfigError
from crma.training.config import TrainConfig
from crma.training.experiment import MissingRun
from crma.training.ray_runs import RayRuns
from crma.training.record import silent


def test_without_ray_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    run = MissingRun(TrainConfig.from_dict({"tasks": ["a"]}), tmp_path)
    with pytest.raises(ConfigError, match=r"pip install 'crma-server\[ray\]'"):
        list(RayRuns()("try", {"FROZEN-seed0": run}, silent))


def test_an_experiment_whose_records_are_all_there_needs_no_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert list(RayRuns()("try", {}, silent)) == []
