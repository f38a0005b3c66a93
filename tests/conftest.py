"""Fixtures that more than one folder of tests uses. What they are made of is in `tiny.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from crma.models.base_model import BaseModel
    from crma.store.adapter_store import AdapterStore


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The tiny Llama with its tokenizer, pulled into a cache of its own; read only."""
    from tiny import pulled_base

    return pulled_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(base: BaseModel, tmp_path: Path) -> AdapterStore:
    """As `tiny.filled_store`."""
    from tiny import filled_store

    return filled_store(tmp_path / "store", base)


@pytest.fixture(scope="session")
def write_task() -> Callable[[Path, tuple[str, str]], None]:
    """Writes a task into a new folder: twelve examples a split, with two answers in turn."""

    def write(folder: Path, answers: tuple[str, str]) -> None:
        folder.mkdir(parents=True)
        for split in ("train", "validation", "holdout"):
            lines = [
                {"prompt": f"{split} {i * 37}?", "completion": answers[i % 2]} for i in range(12)
            ]
            (folder / f"{split}.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )

    return write
