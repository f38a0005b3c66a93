"""Fixtures that more than one folder of tests uses. What they are made of is in `tiny.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import pulled_base

from crma.pull import BaseModel


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The tiny Llama with its tokenizer, pulled into a cache of its own; read only."""
    return pulled_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def home(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that holds `base`, as $CRMA_HOME."""
    home = base.path.parents[1]
    monkeypatch.setenv("CRMA_HOME", str(home))
    return home
