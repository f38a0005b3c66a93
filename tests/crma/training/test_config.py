"""crma.training.config and arms: every key known, every value checked, every arm what it says."""

from pathlib import Path
from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.training.arms import ARMS
from crma.training.config import TrainConfig


def test_a_file_is_read_and_given_values_come_before_it(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'tasks = ["medical", "legal"]\nseed = 42\n[crma]\nlater_moves = ["S", "gamma"]\n'
    )
    config = TrainConfig.read(path, arm="FROZEN", seed=None)
    assert (config.tasks, config.arm, config.seed) == (("medical", "legal"), "FROZEN", 42)
    assert config.crma.later_moves == ("S", "gamma")
    assert TrainConfig.from_dict(config.model_dump(mode="json")) == config


WRONG = [
    ({}, "tasks"),
    ({"tasks": ["one/a", "two/a"]}, "tasks"),
    ({"warmup": 1.0}, "warmup"),
    ({"lora": {"dropout": 0.1}}, "lora.dropout"),
    ({"crma": {"later_moves": ["M"]}}, "crma.later_moves[0]"),
]


@pytest.mark.parametrize(("values", "field"), WRONG)
def test_a_wrong_value_is_refused_by_its_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(
            ({"tasks": ["a"]} if values and "tasks" not in values else {}) | values
        )
    assert caught.value.field == field


@pytest.mark.parametrize("content", [b"tasks = [", b"\xff"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read run\.toml"):
        TrainConfig.read(tmp_path / "run.toml")


def test_a_matched_arm_has_the_least_rank_with_as_many_parameters() -> None:
    matched = ARMS["FROZEN-matched"]
    for per_rank, crma in ((100, 1), (100, 100), (100, 101), (7, 250)):
        rank = matched.rank(8, per_rank, crma)
        assert rank * per_rank >= 8 * per_rank + crma > (rank - 1) * per_rank
    assert {arm.rank(8, 100, 1000) for arm in ARMS.values() if not arm.matched} == {8}
