"""The shipped study on a tiny model: the same phases, arms and rules, few seeds, and tasks of a few
questions.
"""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import EXPERIMENTS

from crma.models.base_model import BaseModel

STUDY = "sharing.toml"
TASKS = {"first": ("yes", "no"), "second": ("left", "right"), "third": ("up", "down")}
NUM_SEEDS = 2  # of every arm
ENDPOINT = """
name = "small"
arm = "winner"
against = ["FROZEN"]
measure = "holdout"
seeds = [0, 1]
orders = [["a", "b"]]
alpha = 0.05
drift_margin = 0.5
worst_drift = 1.0
"""


def write_small_study(
    root: Path, base: BaseModel, write_task: Callable[[Path, tuple[str, str]], None]
) -> Path:
    """Write the tasks and the files of the study below a folder. Returns the study's file."""
    folders = []
    for name, answers in TASKS.items():
        folder = root / "data" / name
        write_task(folder, answers)
        reserve = (folder / "holdout.jsonl").read_text().replace("holdout", "reserve")
        (folder / "reserve.jsonl").write_text(reserve)
        folders.append(str(folder))
    study = _read(EXPERIMENTS / STUDY)
    for phase in study["phases"]:
        experiment = _read(EXPERIMENTS / phase["experiment"])
        _write(root / phase["experiment"], _small(experiment, folders, base))
    endpoint = _read(EXPERIMENTS / study["endpoint"])
    endpoint |= {"seeds": endpoint["seeds"][:NUM_SEEDS], "orders": _orders(folders)}
    _write(root / study["endpoint"], endpoint)
    _write(root / STUDY, study)
    return root / STUDY


def _small(experiment: dict[str, Any], folders: list[str], base: BaseModel) -> dict[str, Any]:
    config = experiment["config"] | {"model": str(base.path), "dtype": "float32", "epochs": 2}
    config["tasks"] = folders
    if "orders" in experiment:
        experiment["orders"] = _orders(folders)
    for runs in experiment["runs"]:
        runs["seeds"] = runs["seeds"][:NUM_SEEDS]
    return experiment | {"config": config}


def _orders(tasks: list[str]) -> list[list[str]]:
    return [tasks, [*tasks[1:], tasks[0]]]


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def _write(path: Path, content: dict[str, Any]) -> None:
    lines = [f"{key} = {_toml(value)}" for key, value in content.items()]
    path.write_text("\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    """A value as TOML has it within a line."""
    if isinstance(value, dict):
        items = [f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)
