"""The file of keys: what it refuses, that it is private, and that changes are whole."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crma.access.key import Key, digest_of, new_key, read_key
from crma.access.key_file import KeyFile
from crma.core.errors import ConfigError

DIGEST = digest_of("x")


def key(name: str = "one", **fields: Any) -> Key:
    fields = {"sha256": digest_of(name), "scopes": ["generate"], **fields}
    return read_key(name=name, **fields)


def test_keys_that_were_added_are_read_back_until_they_are_revoked(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    first = key("one", scopes=["generate", "ablate"], tasks=["legal"], tenant="t")
    second = key("two", limits={"requests_per_minute": 3})
    file.add(first)
    file.add(second)
    assert file.read() == (first, second)
    file.revoke("one")
    assert file.read() == (second,)


def test_the_file_is_private_and_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = new_key()
    KeyFile(path).add(key(sha256=digest_of(secret)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    path.chmod(0o644)
    KeyFile(path).add(key("two"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_cannot_be_guessed() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(each) >= 40 for each in keys)


def test_a_named_pipe_is_refused_by_name_and_a_link_is_followed(tmp_path: Path) -> None:
    """The start waited for somebody to write to the pipe. Kubernetes mounts secrets as links."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match=f"{pipe} cannot be read: not a plain file") as caught:
        KeyFile(pipe).read()
    assert caught.value.field == "keys_file"
    KeyFile(tmp_path / "keys.json").add(key())
    link.symlink_to(tmp_path / "keys.json")
    assert KeyFile(link).read() == (key(),)


def test_a_name_is_given_once_and_only_a_known_name_is_revoked(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.add(key("one"))
    before = file.path.read_bytes()
    with pytest.raises(ConfigError, match="already"):
        file.add(key("one", sha256=DIGEST))
    with pytest.raises(ConfigError) as caught:
        file.revoke("two")
    assert caught.value.allowed == ["one"]
    assert file.path.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "A"}, "name"),
        ({"name": "../x"}, "name"),
        ({"name": "x\n"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "admin"}, "key"),  # the admin key of the settings
        ({"name": "env-0123"}, "key"),  # the API keys of the settings
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes.0"),
        ({"scopes": ["admin"], "tasks": ["legal"]}, "key"),
        ({"tasks": ["Legal"]}, "tasks.0"),
        ({"tenant": "tenant 1"}, "tenant"),
        ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"limits": {"per_day": 1}}, "limits.per_day"),
        ({"sha256": "0" * 63}, "sha256"),
        ({"key": "secret"}, "key"),
    ],
)
def test_what_a_key_cannot_be_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    fields = {"name": "one", "sha256": DIGEST, "scopes": ["generate"], **fields}
    with pytest.raises(ConfigError) as caught:
        read_key(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"keys": {}}',
        b'{"keys": [{"name": "one"}]}',
        b'{"keys": [], "more": 1}',
        b"\xff",
        b'{"keys": []}' + b" " * 2**22,
        json.dumps({"keys": [json.loads(key().model_dump_json())] * 2}).encode(),
        json.dumps(
            {"keys": [json.loads(key(name, sha256=DIGEST).model_dump_json()) for name in "ab"]}
        ).encode(),
    ],
)
def test_a_file_that_is_none_of_keys_is_refused_without_showing_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        KeyFile(path).read()
    assert str(path) in caught.value.message
    assert caught.value.value is None
    assert DIGEST not in caught.value.message


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crma keys add"):
        KeyFile(tmp_path / "keys.json").read()


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_keys_or_a_config_error(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any bytes.json"
    path.write_bytes(content)
    with suppress(ConfigError):
        assert KeyFile(path).read() == ()
