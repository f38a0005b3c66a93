"""Settings come from the environment only, and what cannot be honoured is refused by name."""

from pathlib import Path

import pytest

from crma.core.errors import ConfigError
from server.settings import Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [f"CRMA_{name.upper()}" for name in Settings.model_fields]:
        monkeypatch.delenv(name, raising=False)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PORT": "9",
        "API_KEYS": "a, b,",
        "LOAD_BACKBONE": "false",
        "STORE": "x",
        "HOME": "",
    }.items():
        monkeypatch.setenv(f"CRMA_{name}", value)
    settings = Settings.load()
    assert (settings.port, settings.load_backbone, settings.store, settings.home) == (
        9,
        False,
        Path("x"),
        None,
    )
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"]


@pytest.mark.parametrize("name", ["CRMA_MAX_NUM_SEQ", "crma_prot", "CRMA_"])
def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(
        ConfigError, check=lambda e: e.field == name and "CRMA_MAX_NUM_SEQS" in e.allowed
    ):
        Settings.load()


@pytest.mark.parametrize(
    "given", ["PORT=65536", "PORT=http", "DTYPE=float16", "REQUEST_TIMEOUT_S=nan"]
)
def test_a_value_that_cannot_be_used_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    name, _, value = f"CRMA_{given}".partition("=")
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, check=lambda error: (error.field, error.value) == (name, value)
    ):
        Settings.load()


def test_settings_do_not_show_keys() -> None:
    assert "secret" not in repr(Settings(api_keys="secret", admin_key="secret"))
