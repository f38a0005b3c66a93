"""Settings come from the environment only, and what cannot be honoured is refused by name."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

import server
from crma.errors import ConfigError
from server.settings import Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [f"CRMA_{name.upper()}" for name in Settings.model_fields]:
        monkeypatch.delenv(name, raising=False)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORT": "9", "API_KEYS": "a, b,", "LOAD_BACKBONE": "false", "STORE": "x", "HOME": ""}.items():
        monkeypatch.setenv(f"CRMA_{name}", value)
    settings = Settings.load()
    assert (settings.port, settings.load_backbone, settings.store, settings.home) == (9, False, Path("x"), None)
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"]


@pytest.mark.parametrize("name", ["CRMA_MAX_NUM_SEQ", "crma_prot", "CRMA_"])
def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.field == name
    assert "CRMA_MAX_NUM_SEQS" in caught.value.allowed


BAD = ["PORT=65536", "PORT=http", "MAX_NUM_SEQS=0", "DTYPE=float16", "DEVICE=tpu", "LOAD_BACKBONE=maybe"]


@pytest.mark.parametrize("given", [*BAD, "REQUEST_TIMEOUT_S=nan", "DRAIN_TIMEOUT_S=-1"])
def test_a_value_that_cannot_be_used_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    name, _, value = f"CRMA_{given}".partition("=")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert (caught.value.field, caught.value.value) == (name, value)


def test_settings_do_not_change_and_do_not_show_keys() -> None:
    settings = Settings(api_keys="secret", admin_key="secret")
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    assert "secret" not in repr(settings)


def test_the_table_has_every_setting_with_a_help_text() -> None:
    rows = list(Settings.table())
    assert [name for name, _, _ in rows] == [f"CRMA_{name.upper()}" for name in Settings.model_fields]
    assert all(help.endswith(".") for _, _, help in rows)
    assert ("CRMA_LOAD_BACKBONE", "true") in [row[:2] for row in rows]


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert server.__version__ == project["version"]
