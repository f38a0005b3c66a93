"""server.settings: settings come from the environment only, and errors name the variable."""

from pathlib import Path

import pytest

from crma.core.errors import ConfigError
from server.settings import Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CRMA_{name.upper()}", raising=False)


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRMA_PORT", "9")
    monkeypatch.setenv("CRMA_API_KEYS", "a, b,")
    monkeypatch.setenv("CRMA_LOAD_BACKBONE", "false")
    monkeypatch.setenv("CRMA_STORE", "x")
    monkeypatch.setenv("CRMA_HOME", "")
    settings = Settings.load()
    assert settings.port == 9
    assert settings.load_backbone is False
    assert settings.store == Path("x")
    assert settings.home is None
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"]


@pytest.mark.parametrize("name", ["CRMA_MAX_NUM_SEQ", "crma_prot", "CRMA_"])
def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.field == name
    assert "CRMA_MAX_NUM_SEQS" in caught.value.allowed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CRMA_PORT", "65536"),
        ("CRMA_PORT", "http"),
        ("CRMA_DTYPE", "float16"),
        ("CRMA_REQUEST_TIMEOUT_S", "nan"),
    ],
)
def test_an_invalid_value_is_refused_with_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.field == name
    assert caught.value.value == value


def test_the_repr_of_settings_hides_keys() -> None:
    assert "secret" not in repr(Settings(api_keys="secret", admin_key="secret"))
