"""server.settings: settings come from the environment only, and errors name the variable."""

from pathlib import Path

import pytest

from crma.core.cache import cache_home
from crma.core.errors import ConfigError
from server.settings import Settings, drop_service_links


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
        ("CRMA_DTYPE", "float8"),
        ("CRMA_REQUEST_TIMEOUT_S", "nan"),
        ("CRMA_REQUEST_TIMEOUT_S", "inf"),
        ("CRMA_STEP_TIMEOUT_S", "1e12"),
        ("CRMA_TARGET_STEP_S", "1e308"),
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


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("dtype", "auto, bfloat16, float16 or float32"),
        ("prefix_caching", "true or false"),
        ("request_timeout_s", "a number above 0 and of 31536000 or less"),
        ("max_adapter_mib", "an integer of 1 or more"),
        ("model", "a text that is not empty"),
        ("api_keys", "texts, separated by commas"),
        ("home", "a path"),
    ],
)
def test_the_allowed_values_are_values_and_not_the_help(name: str, allowed: str) -> None:
    """CRMA_PORT=abc said "allowed: Port to listen on."."""
    assert Settings.allowed(name) == allowed


def test_an_invalid_port_says_which_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRMA_PORT", "abc")
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.allowed == "an integer from 1 to 65535"


def test_every_setting_says_what_it_allows() -> None:
    texts = {name: Settings.allowed(name) for name in Settings.model_fields}
    assert all(texts.values())
    assert not any(field.description in texts.values() for field in Settings.model_fields.values())


@pytest.mark.parametrize("name", ["home", "store", "evaluations"])
def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv(f"CRMA_{name.upper()}", "~/x")
    assert getattr(Settings.load(), name) == Path("/home/someone/x")
    if name == "home":
        assert cache_home() == Settings.load().home


LINKS = {
    "CRMA_SERVICE_HOST": "10.0.0.1",
    "CRMA_SERVICE_PORT": "8000",
    "CRMA_SERVICE_PORT_HTTP": "8000",
    "CRMA_PORT": "tcp://10.0.0.1:8000",
    "CRMA_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "CRMA_PORT_8000_TCP_PROTO": "tcp",
    "CRMA_PORT_8000_TCP_PORT": "8000",
    "CRMA_PORT_8000_TCP_ADDR": "10.0.0.1",
}


@pytest.mark.parametrize("service", ["CRMA_", "CRMA_BLUE_"])
def test_what_kubernetes_sets_for_a_service_is_left_aside_by_name(
    monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    """A Service named crma sets CRMA_PORT=tcp://…, which stopped the server."""
    links = {service + name.removeprefix("CRMA_"): value for name, value in LINKS.items()}
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    assert drop_service_links() == sorted(links)
    assert Settings.load().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CRMA_SERVICE_HOST", "10.0.0.1"),  # alone: its Service would have set the port too
        ("CRMA_PORT", "tcp://10.0.0.1:8000"),
        ("CRMA_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("CRMA_PROT", "9000"),
    ],
)
def test_a_mistyped_setting_is_no_service_and_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert drop_service_links() == []
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.field == name


def test_a_port_that_the_operator_set_beside_a_service_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**LINKS, "CRMA_PORT": "9000"}.items():
        monkeypatch.setenv(name, value)
    assert drop_service_links() == sorted(set(LINKS) - {"CRMA_PORT"})
    assert Settings.load().port == 9000


def test_a_mistyped_setting_beside_a_service_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LINKS, "CRMA_PORT_HTTP": "1"}.items():
        monkeypatch.setenv(name, value)
    assert drop_service_links() == sorted(LINKS)
    with pytest.raises(ConfigError, match="CRMA_PORT_HTTP is not a setting"):
        Settings.load()


def test_the_repr_of_settings_hides_keys() -> None:
    assert "secret" not in repr(Settings(api_keys="secret", admin_key="secret"))


@pytest.mark.parametrize("value", [",", " , ,", " "])
@pytest.mark.parametrize("name", ["CRMA_API_KEYS", "CRMA_ALLOWED_HOSTS"])
def test_a_list_without_anything_in_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """CRMA_API_KEYS="," opened the server to all."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert caught.value.field == name


def test_the_size_of_the_kv_cache_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRMA_KV_CACHE_MIB", "512")
    assert Settings.load().kv_cache_mib == 512
    monkeypatch.setenv("CRMA_KV_CACHE_TOKENS", "8192")
    with pytest.raises(ConfigError, match="only one of the two") as caught:
        Settings.load()
    assert "CRMA_KV_CACHE_MIB" in caught.value.message
    assert "CRMA_KV_CACHE_TOKENS" in caught.value.message


def test_a_store_is_a_folder_or_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, store in (("~/x", Path.home() / "x"), ("s3://bucket/x", "s3://bucket/x")):
        monkeypatch.setenv("CRMA_STORE", value)
        assert Settings.load().store == store
    monkeypatch.setenv("CRMA_STORE", "ftp://host/x")
    with pytest.raises(ConfigError, match=r"CRMA_STORE: .*allowed: a folder, s3://…") as caught:
        Settings.load()
    assert (caught.value.field, caught.value.value) == ("CRMA_STORE", "ftp://host/x")


@pytest.mark.parametrize(
    ("engine", "name", "value"),
    [
        ("vllm", "CRMA_KERNEL", "on"),
        ("vllm", "CRMA_QUANTIZATION", "int8"),
        ("vllm", "CRMA_TARGET_STEP_S", "0.1"),
        ("native", "CRMA_TENSOR_PARALLEL_SIZE", "2"),
        ("native", "CRMA_MAX_LORAS", "4"),
    ],
)
def test_a_setting_of_another_engine_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, engine: str, name: str, value: str
) -> None:
    monkeypatch.setenv("CRMA_ENGINE", engine)
    Settings.load().check_engine()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=engine) as caught:
        Settings.load().check_engine()
    assert f"CRMA_{caught.value.field.upper()}" == name
