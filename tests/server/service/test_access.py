"""A server that others can reach does not start without keys."""

from pathlib import Path

import api_keys
import pytest

from crma.core.errors import ConfigError
from server.service.access import check_access
from server.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_server_for_others_needs_keys_or_a_clear_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_access(Settings(host=host, admin_key="root"))
    assert caught.value.field == "host"
    for way_out in ("CRMA_API_KEYS", "CRMA_KEYS_FILE", "CRMA_ALLOW_OPEN=true"):
        assert way_out in caught.value.message
    api_keys.add(tmp_path / "keys.json", "one")
    check_access(Settings(host=host, api_keys="key"))
    check_access(Settings(host=host, keys_file=tmp_path / "keys.json"))
    check_access(Settings(host=host, allow_open=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_for_this_machine_needs_none(host: str) -> None:
    check_access(Settings(host=host))


def test_files_that_cannot_be_used_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    for setting in ("keys_file", "audit_log"):
        with pytest.raises(ConfigError) as caught:
            check_access(Settings(**{setting: tmp_path}))
        assert caught.value.field == setting
