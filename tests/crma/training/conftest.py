"""Tiny tasks and runs of the sequential protocol on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from crma.models.base_model import BaseModel
    from crma.training.protocol import Run
    from crma.training.training_model import TrainingModel


@pytest.fixture(scope="session")
def data(write_task: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks as folders; read only."""
    root = tmp_path_factory.mktemp("data")
    write_task(root / "first", ("yes", "no"))
    write_task(root / "second", ("left", "right"))
    write_task(root / "third", ("up", "down"))
    return root


@pytest.fixture(scope="session")
def make(base: BaseModel, data: Path) -> Callable[..., Run]:
    """Makes a run of two tasks with 12 steps each; keywords change its configuration."""
    from crma.training.config import TrainConfig
    from crma.training.protocol import Run

    def make(
        out: Path,
        arm: str = "MODULAR",
        *,
        tasks: Any = ("first", "second"),
        loaded: TrainingModel | None = None,
        **changes: Any,
    ) -> Run:
        crma = {"num_streams": 2, "stream_rank": 2, "later_scale": 0.5}
        values = {
            "arm": arm,
            "tasks": [str(data / task) for task in tasks],
            "epochs": 2,
            "batch_size": 2,
            "dtype": "float32",
            **changes,
            "lora": {"rank": 2, "alpha": 4.0} | changes.get("lora", {}),
            "crma": crma | changes.get("crma", {}),
        }
        return Run(TrainConfig.from_dict(values), base, out, lambda *_: None, loaded)

    return make
