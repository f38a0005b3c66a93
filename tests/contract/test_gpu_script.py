"""scripts/gpu.sh, as far as it can be checked without a GPU and in a moment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

PARTS = ["tests", "exactness-float32", "exactness-bfloat16", "bench", "training"]
MAX_SECONDS = 480  # of all parts together


def run(*arguments: str, python: str = "/bin/false") -> subprocess.CompletedProcess[str]:
    """Run the script, by default with a Python that fails at once."""
    command = [str(ROOT / "scripts/gpu.sh"), "--quick", *arguments]
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert done.returncode == 1
    assert summary["device"] == "cuda"
    assert [part["part"] for part in summary["parts"]] == PARTS
    assert {part["rc"] for part in summary["parts"]} == {1}


def test_all_parts_together_have_less_than_8_minutes(tmp_path: Path) -> None:
    (tmp_path / "carried").mkdir()
    run("--carried", str(tmp_path / "carried"), str(tmp_path / "out"))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    limits = {part["part"]: part["limit_s"] for part in summary["parts"]}
    assert limits.keys() == {"setup", *PARTS}
    assert sum(limits.values()) < MAX_SECONDS


@pytest.mark.parametrize("part", PARTS)
def test_one_part_can_run_alone(tmp_path: Path, part: str) -> None:
    run("--device", "cpu", "--only", part, str(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [each["part"] for each in summary["parts"]] == [part]
    assert summary["device"] == "cpu"


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    done = run("--gpu", str(tmp_path))
    assert done.returncode == 2
    assert "unknown option --gpu" in done.stderr


@pytest.mark.e2e
def test_on_a_cpu_every_part_writes_what_it_found(tmp_path: Path) -> None:
    """Without bfloat16, which many CPUs only emulate."""
    wanted = ["tests", "exactness-float32", "bench", "training"]
    only = [word for part in wanted for word in ("--only", part)]
    done = run("--device", "cpu", *only, str(tmp_path), python=sys.executable)
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()[-4000:]
    outcomes = [test["outcome"] for test in read(tmp_path / "tests.json")["tests"]]
    assert "passed" in outcomes
    assert "failed" not in outcomes
    (exactness,) = read(tmp_path / "exactness-float32.json")["tests"]
    assert exactness["outcome"] == "passed"
    assert exactness["schedules"] == 1
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert rows[0]["row"] == "start"
    assert all(row["failed"] == 0 for row in rows)
    assert all(row["share_of_limit"] > 0 for row in rows[1:])
    assert rows[1]["limits"]["read_gb_s"] > 0
    assert read(tmp_path / "training.json")["loss"][-1][-1] > 0


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content
