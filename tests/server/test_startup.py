"""server.startup: what stops a start, in words."""

from pathlib import Path

import pytest

from crma.core.errors import ConfigError, CrmaError, NotFound, UnsupportedModel
from server.settings import Settings
from server.startup import build, explain


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ConfigError("too small", field="kv_cache_tokens", value=64, allowed=">= 2048"),
            "CRMA_KV_CACHE_TOKENS: too small (allowed: >= 2048)",
        ),
        (UnsupportedModel("no blocks", field="architecture"), "no blocks"),
        (CrmaError("no field"), "no field"),
    ],
)
def test_a_line_names_the_setting_that_stopped_the_start(error: CrmaError, line: str) -> None:
    assert explain(error) == line


@pytest.mark.parametrize("there", [False, True], ids=["missing", "other"])
def test_a_folder_that_is_no_store_stops_the_start_by_name(there: bool, tmp_path: Path) -> None:
    """CRMA_STORE=/typo was ready, with no tasks."""
    folder = tmp_path / "typo"
    if there:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    with pytest.raises(NotFound) as caught:
        build(Settings(store=folder))
    line = explain(caught.value)
    assert line.startswith("CRMA_STORE: ")
    assert str(folder) in line
    assert there or f"`crma store init --store {folder}`" in line
