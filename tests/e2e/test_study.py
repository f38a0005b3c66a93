"""`crma study crma/experiments/sharing.toml` from its first phase to its last, on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import crma
from small_study import ENDPOINT, write_small_study

from crma.core.digests import file_digest
from crma.models.base_model import BaseModel

pytestmark = pytest.mark.e2e

DECIDES = {"regime", "ceiling", "screening", "clinc-4", "clinc-100"}
REPORTS = {"confirm", "clinc-4-arms", "full-size", "clinc-100-arms"}


BROKEN = """
name = "broken"
endpoint = "endpoint.toml"
config = {{tasks = ["{task}"], model = "{model}", dtype = "float32"}}
runs = [
    {{arm = "FROZEN", label = "fails", seeds = [0], changes.lora.lr = 1e30}},
    {{arm = "FROZEN", label = "goes-on", seeds = [0, 1, 2, 3, 4, 5, 6, 7], changes.epochs = 20}},
]
"""
BROKEN_STUDY = """
name = "one"
endpoint = "endpoint.toml"
phases = [{name = "broken", experiment = "broken.toml"}]
"""


@pytest.fixture(scope="module")
def root(
    base: BaseModel, write_task: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder in which the whole study was run, by two processes at once."""
    root = tmp_path_factory.mktemp("study")
    file = write_small_study(root, base, write_task)
    code, out, err = study(file, "--workers", 2, "--together", 3, "--regardless")
    assert code == 0, err
    assert (root / "results" / "sharing.md").read_text() == out
    return root


def study(file: Path, *options: object) -> tuple[int, str, str]:
    folders = ("--results", file.parent / "results", "--work", file.parent / "work")
    return crma("study", file, *folders, *options)


def records(root: Path, phase: str) -> dict[str, dict[str, Any]]:
    paths = (root / "results" / phase).glob("*-seed*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths}


def decision(root: Path, phase: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "results" / phase / "decision.json").read_text())
    return content


def regime(root: Path) -> dict[str, Any]:
    """What the regime decided, perhaps with smaller batches."""
    first = decision(root, "regime")["taken"]
    taken: dict[str, Any] = first if first["by_rule"] else decision(root, "regime-2")["taken"]
    return taken


def test_every_phase_ran_and_decided(root: Path) -> None:
    for phase in DECIDES:
        assert decision(root, phase)["in_words"], phase
    for phase in DECIDES | REPORTS:
        assert records(root, phase), phase


def test_all_later_phases_share_the_regime(root: Path) -> None:
    setting = regime(root)["setting"]
    wanted = (setting["batch_size"], setting["lr"], 0.9 if setting["averaged"] else 0.0)
    for phase in (DECIDES | REPORTS) - {"regime"}:
        for name, record in records(root, phase).items():
            config = record["config"]
            found = (config["batch_size"], config["lora"]["lr"], config["ema"])
            assert found == wanted, (phase, name)


def test_every_record_has_the_digest_of_the_endpoint(root: Path) -> None:
    digest = file_digest(root / "endpoint.toml")
    paths = list((root / "results").glob("*/*-seed*.json"))
    assert len(paths) > 100
    assert {json.loads(path.read_text())["endpoint"] for path in paths} == {digest}


def test_the_winner_of_the_screening_is_confirmed_with_its_controls(root: Path) -> None:
    winner = decision(root, "screening")["taken"]["winner"]
    assert winner is not None  # the tiny backbone hardly moves
    labels = {name.rpartition("-seed")[0] for name in records(root, "confirm")}
    assert {winner, f"{winner}_M=I", f"{winner}_free-M", "MODULAR-stop", "PRIVATE"} <= labels
    text = (root / "results" / "sharing.md").read_text()
    assert "Drift of prior tasks:" in text
    assert f"Certificate of {winner}: holds in 2 of 2 runs" in text


def test_a_second_run_makes_nothing_and_says_the_same(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (root / "results").glob("*/*.json")}
    code, out, err = study(root / "sharing.toml", "--regardless")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, again, _ = study(root / "sharing.toml", "--regardless", "--dry-run", "--json")
    assert {row["missing"] for row in json.loads(again)} == {0}
    assert out == (root / "results" / "sharing.md").read_text()


def test_all_is_made_that_does_not_need_a_run_that_failed(
    base: BaseModel, write_task: Callable[..., None], tmp_path: Path
) -> None:
    write_task(tmp_path / "own", ("yes", "no"))
    (tmp_path / "endpoint.toml").write_text(ENDPOINT)
    text = BROKEN.format(task=tmp_path / "own", model=base.path)
    (tmp_path / "broken.toml").write_text(text)
    (tmp_path / "study.toml").write_text(BROKEN_STUDY)
    code, _, err = study(tmp_path / "study.toml", "--workers", 2)
    assert (code, "not finite" in err, "fails-seed0" in err) == (1, True, True)
    assert sorted(records(tmp_path, "broken")) == [f"goes-on-seed{seed}" for seed in range(8)]
