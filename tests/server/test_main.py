"""server.__main__: what an operator reads when the server does not start."""

import pytest

from crma.core.errors import ConfigError, CrmaError, UnsupportedModel
from server.__main__ import explain


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
