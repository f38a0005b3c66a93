"""`crma experiment` and `crma data clinc`: what they print, and what a dry run leaves alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import crma
from paths import EXPERIMENTS

from crma.models.base_model import BaseModel

FILE = """
name = "small"
report = "regime"

[config]
tasks = ["{task}"]
model = "{model}"
dtype = "float32"
epochs = 1
matrix = false
measure = "validation"

[[runs]]
label = "batch-6"
arm = "FROZEN"
seeds = [0]
changes = {{ batch_size = 6 }}

[[runs]]
label = "batch-3"
arm = "FROZEN"
seeds = [0]
changes = {{ batch_size = 3 }}
"""


def test_a_dry_run_counts_and_runs_nothing_and_a_run_prints_what_it_was_for(
    base: BaseModel, write_task: Any, tmp_path: Path
) -> None:
    write_task(tmp_path / "own", ("yes", "no"))
    config = tmp_path / "small.toml"
    config.write_text(FILE.format(task=tmp_path / "own", model=base.path))
    folders = ("--results", tmp_path / "results", "--work", tmp_path / "work")
    code, out, _ = crma("experiment", config, *folders, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out) == {
        "runs": 2,
        "missing": ["batch-6-seed0", "batch-3-seed0"],
        "examples": 24,
        "seconds": None,
        "machine": "",
    }
    assert not (tmp_path / "results").exists()
    code, out, _ = crma("experiment", config, *folders)
    assert code == 0
    assert "| 6 | 0.005 | last | 8 | 1 |" in out
    assert "| 6 | 0.005 | last | 8 | 1 |" in out
    assert out.endswith("try smaller batches or more steps.\n")
    code, out, _ = crma("experiment", config, *folders, "--dry-run")
    assert "missing            0" in out
    assert "0.0 h, one after the other" in out


@pytest.mark.parametrize("name", ["regime", "ceiling", "confirm"])
def test_the_planned_experiments_say_how_many_runs_they_have(name: str, tmp_path: Path) -> None:
    config = EXPERIMENTS / f"{name}.toml"
    code, out, _ = crma("experiment", config, "--results", tmp_path, "--dry-run", "--json")
    assert code == 0
    planned = {"regime": 72, "ceiling": 48, "confirm": 168}
    assert json.loads(out)["runs"] == planned[name]


def test_clinc_asks_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRMA_HOME", str(tmp_path))
    code, _, err = crma("data", "clinc")
    assert (code, "--source clinc=FOLDER" in err) == (1, True)
    code, _, err = crma("data", "clinc", "--source", f"clinc={tmp_path}")
    assert (code, "is not a folder of CLINC150" in err) == (1, True)
