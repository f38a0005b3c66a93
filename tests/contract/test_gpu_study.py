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


def run(
    *arguments: object, python: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts/gpu_study.sh"), "--device", "cpu", *map(str, arguments)]
    environment = {**os.environ, "PYTHON": python, **variables}
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


SCRIPTED = """#!/usr/bin/env bash
# Stands for Python: notes what it is asked for, and answers as told.
echo "$*" >> "$ASKED"
case "$*" in
    -c*) exec "$REAL" "$@" ;;
    *" --speed "*) [[ -n ${SPEED:-} ]] && echo "$SPEED" ;;
    "-m pytest"*) exit "${TESTED:-0}" ;;
    *) exit "${STUDIED:-0}" ;;
esac
"""


def scripted(tmp_path: Path, *arguments: str, **answers: str) -> tuple[int, list[str]]:
    """Run the script with a scripted Python. Returns its exit code, and its commands of a study."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(SCRIPTED)
    python.chmod(0o755)
    environment = {"ASKED": str(asked), "REAL": sys.executable, **answers}
    done = run(*arguments, tmp_path / "out", python=str(python), **environment)
    commands = asked.read_text().splitlines()
    return done.returncode, [command for command in commands if "crma study" in command]


def speed(workers: int, *, graphs: bool) -> str:
    return json.dumps({"fastest": {"workers": workers, "graphs": graphs, "steps_per_s": 9.0}})


def test_the_study_runs_as_is_fastest_and_its_longest_phases_last(tmp_path: Path) -> None:
    code, studies = scripted(tmp_path, "--together", "5", SPEED=speed(4, graphs=True))
    assert code == 0
    assert len(studies) == 3
    assert "--workers 4" in studies[1]
    assert "--together 5" in studies[1]
    assert "--until full-size" in studies[1]
    assert studies[2].endswith("--until ")


def test_without_a_passing_test_nothing_is_recorded(tmp_path: Path) -> None:
    _, studies = scripted(tmp_path, SPEED=speed(4, graphs=True), TESTED="1")
    assert "--no-graphs" not in studies[0]
    assert all("--no-graphs" in study for study in studies[1:])


def test_what_was_tested_is_not_tested_again(tmp_path: Path) -> None:
    scripted(tmp_path, "--tested", SPEED=speed(4, graphs=True))
    assert "pytest -q" not in (tmp_path / "asked").read_text()


def test_graphs_that_are_no_gain_are_left_out_on_a_gpu(tmp_path: Path) -> None:
    _, studies = scripted(tmp_path, "--device", "cuda", SPEED=speed(2, graphs=False))
    assert all("--no-graphs" in study for study in studies[1:])


def test_where_the_speed_cannot_be_measured_the_study_is_careful(tmp_path: Path) -> None:
    code, studies = scripted(tmp_path)
    assert code == 0
    assert all("--workers 4" in study and "--no-graphs" in study for study in studies[1:])
    assert "pytest -q" not in (tmp_path / "asked").read_text()


def test_a_study_that_fails_is_not_begun_again(tmp_path: Path) -> None:
    code, studies = scripted(tmp_path, "--workers", "1", STUDIED="3")
    assert code == 3
    assert len(studies) == 1


def test_what_is_given_is_not_measured(tmp_path: Path) -> None:
    given = ("--workers", "3", "--until", "ceiling", "--no-graphs", "--fresh-class")
    code, studies = scripted(tmp_path, *given)
    assert code == 0
    (study,) = studies
    for option in ("--workers 3", "--until ceiling", "--no-graphs", "--fresh-class"):
        assert option in study


def test_what_was_dropped_is_told(tmp_path: Path) -> None:
    kept, dropped = (tmp_path / "results/ceiling" / name for name in ("a.json", "b.json"))
    kept.parent.mkdir(parents=True)
    kept.touch()
    dropped.touch()
    deletes = SCRIPTED.replace("case", 'rm -f "$6/ceiling/b.json"\ncase', 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SCRIPTED", deletes)
        options = ("--workers", "1", "--results", str(tmp_path / "results"))
        scripted(tmp_path, *options)
    assert (tmp_path / "out/dropped.txt").read_text() == "./ceiling/b.json\n"


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
