"""Fixtures that more than one folder of tests uses; `tiny.py` makes them.

`tiny` imports torch and transformers, so the fixtures import it only when a test needs them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import built_kernels
import pytest
from json_report import JsonReport

if TYPE_CHECKING:
    from crma.models.base_model import BaseModel
    from crma.store.adapter_store import AdapterStore


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        help="where tests/gpu and tests/e2e/test_exactness.py run; default: cuda and cpu",
    )
    parser.addoption(
        "--schedules", type=int, help="how many tests/e2e/test_exactness.py runs; default: its own"
    )
    parser.addoption("--record", type=Path, help="file for what the tests did, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # `_garbage` looks for it
    gc.freeze()
    if hasattr(config, "workerinput"):
        return
    built_kernels.share(config)
    path: Path | None = config.getoption("--record")
    if path is not None:
        config.pluginmanager.register(JsonReport(path.absolute()))


@pytest.fixture(scope="module", autouse=True)
def _garbage() -> Iterator[None]:
    """Garbage is looked for once a module, and only in what is new.

    All else that is imported stays, and FastAPI's own caches keep every app: to look through it
    again and again took a fifth of the time of the tests of routes.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The tiny Llama with its tokenizer, pulled into a cache of its own. Read only."""
    from tiny import pulled_base

    return pulled_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(base: BaseModel, tmp_path: Path) -> AdapterStore:
    """A store with two tasks, a backbone and a question set: `tiny.filled_store`."""
    from tiny import filled_store

    return filled_store(tmp_path / "store", base)


@pytest.fixture(scope="session")
def write_task() -> Callable[[Path, tuple[str, str]], None]:
    """Writes the data of a task: twelve examples per split, whose answers alternate between two."""

    def write(folder: Path, answers: tuple[str, str]) -> None:
        folder.mkdir(parents=True)
        for split in ("train", "validation", "holdout"):
            lines = []
            for number in range(12):
                example = {"prompt": f"{split} {number * 37}?", "completion": answers[number % 2]}
                lines.append(json.dumps(example) + "\n")
            (folder / f"{split}.jsonl").write_text("".join(lines))

    return write


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of a running PostgreSQL."""
    from postgresql import running_postgresql

    with running_postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty database; None: SQLite, in a folder of the test."""
    from postgresql import empty

    if request.param == "sqlite":
        return None
    url: str = request.getfixturevalue("postgresql_url")
    empty(url)
    return url
