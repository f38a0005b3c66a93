"""`crma pull`: what it leaves beside the model for the commands that come after it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from crma.cli.command import app
from crma.models.base_model import BaseModel, find_base
from crma.models.model_shape import RECORD


def test_a_pull_records_the_shape_of_the_model(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRMA_HOME", str(tmp_path))
    folder = base.path.parents[2] / "tiny"  # it was pulled from here
    result = CliRunner().invoke(app, ["pull", str(folder)])
    assert result.exit_code == 0
    assert (find_base("tiny").path / RECORD).is_file()


def test_a_model_that_takes_no_adapters_can_be_pulled(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRMA_HOME", str(tmp_path))
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    (folder / "model.safetensors").write_bytes((base.path / "model.safetensors").read_bytes())
    result = CliRunner().invoke(app, ["pull", str(folder)])
    assert result.exit_code == 0
    assert not (find_base("strange").path / RECORD).exists()
