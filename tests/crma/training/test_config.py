"""crma.training.config: reading a file, overriding its keys, and refusing invalid ones."""

from pathlib import Path
from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.training.config import TrainConfig

FILE = """
tasks = ["medical", "legal"]
seed = 42

[crma]
later_moves = ["S", "gamma"]
"""


def test_overrides_replace_the_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    config = TrainConfig.read(path, arm="FROZEN", seed=None)
    assert config.tasks == ("medical", "legal")
    assert config.arm == "FROZEN"
    assert config.seed == 42
    assert config.crma.later_moves == ("S", "gamma")


def test_a_dumped_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    config = TrainConfig.read(path)
    assert TrainConfig.from_dict(config.model_dump(mode="json")) == config


INVALID: list[tuple[dict[str, Any], str]] = [
    ({}, "tasks"),
    ({"tasks": ["one/a", "two/a"]}, "tasks"),
    ({"tasks": ["a"], "warmup": 1.0}, "warmup"),
    ({"tasks": ["a"], "lora": {"dropout": 0.1}}, "lora.dropout"),
    ({"tasks": ["a"], "crma": {"later_moves": ["M"]}}, "crma.later_moves[0]"),
]


@pytest.mark.parametrize(("values", "field"), INVALID)
def test_an_invalid_value_is_refused_and_its_field_named(
    values: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values)
    assert caught.value.field == field


def test_an_unknown_key_is_refused_with_those_of_its_table() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({"tasks": ["a"], "epoch": 3})
    assert (caught.value.field, "tasks, arm, seed" in str(caught.value.allowed)) == ("epoch", True)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({"tasks": ["a"], "lora": {"dropout": 0.1}})
    allowed = "rank, alpha, drawn_rank, orthogonality, target_modules, lr"
    assert caught.value.allowed == allowed


@pytest.mark.parametrize("content", [b"tasks = [", b"\xff"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read run\.toml"):
        TrainConfig.read(tmp_path / "run.toml")
