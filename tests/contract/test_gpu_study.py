"""scripts/gpu_study.sh, on a CPU: a study that is cut off, brought back, and gone on with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT
from small_study import write_small_study

from crma.models.base_model import BaseModel


def run(*arguments: object, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts/gpu_study.sh"), "--device", "cpu", *map(str, arguments)]
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def unpack(out: Path, results: Path) -> set[str]:
    """What a run brought back, in the folder of the records."""
    results.mkdir(exist_ok=True)
    before = {path for path in results.rglob("*") if path.is_file()}
    parts = sorted(out.glob("records.tgz.*"))
    archive = b"".join(part.read_bytes() for part in parts)
    subprocess.run(["tar", "xz", "-C", str(results)], input=archive, check=True)
    new = {path for path in results.rglob("*") if path.is_file()} - before
    return {str(path.relative_to(results)) for path in new}


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    done = run("--gpu", tmp_path)
    assert done.returncode == 2
    assert "unknown option --gpu" in done.stderr


def test_a_study_that_fails_says_so_and_still_brings_back_what_there_is(tmp_path: Path) -> None:
    done = run("--results", tmp_path / "none", tmp_path / "out", python="/bin/false")
    assert done.returncode == 1
    assert "ended with 1; 0 new files" in done.stderr
    assert unpack(tmp_path / "out", tmp_path / "results") == set()


@pytest.mark.e2e
def test_a_study_goes_on_from_what_was_brought_back(
    base: BaseModel, write_task: Callable[..., None], tmp_path: Path
) -> None:
    file = write_small_study(tmp_path, base, write_task)
    results, out = tmp_path / "results", tmp_path / "out"
    options = ("--study", file, "--results", results, "--workers", 2)
    first = run(*options, "--until", "regime", out)
    assert first.returncode == 0, (out / "log.txt").read_text()[-4000:]
    brought = unpack(out, results)
    assert "regime/decision.json" in brought
    assert {name.split("/")[0] for name in brought} == {"regime", "sharing.md"}
    second = run(*options, "--until", "ceiling", out)
    assert second.returncode == 0, (out / "log.txt").read_text()[-4000:]
    assert "### ceiling" in (out / "sharing.md").read_text()
    new = unpack(out, results)
    assert {name.split("/")[0] for name in new} == {"ceiling"} | {
        phase for phase in ["regime-2"] if (results / phase).exists()
    }


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_whose_time_is_up_brings_back_the_runs_that_it_made(
    base: BaseModel, write_task: Callable[..., None], tmp_path: Path, workers: int
) -> None:
    file = write_small_study(tmp_path, base, write_task)
    out, results = tmp_path / "out", tmp_path / "results"
    done = run("--study", file, "--results", results, "--workers", workers, "--seconds", 15, out)
    assert done.returncode == 124, (out / "log.txt").read_text()[-4000:]
    for name in unpack(out, results):
        if name.endswith(".json"):
            assert json.loads((results / name).read_text())
