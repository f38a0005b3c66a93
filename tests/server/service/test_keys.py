"""From a key that was sent to its caller, and a file of keys that changes meanwhile."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import api_keys
import pytest
from prometheus_client import CollectorRegistry

from crma.access.key_file import KeyFile
from crma.access.scope import Scope
from crma.core.errors import ConfigError
from server.records.audit import Filter
from server.records.database import Database
from server.service.audit import Audit, AuditLog
from server.service.caller import ADMIN, ANYONE, NOBODY
from server.service.keys import Keys
from server.service.metrics import Metrics
from server.settings import Settings


def made(audit: Audit | None = None, **settings: Any) -> Keys:
    unused = Audit(AuditLog(None), Database(Path("nowhere")), Metrics(CollectorRegistry()))
    return Keys(Settings(**settings), audit or unused)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the key `one`."""
    path = tmp_path / "keys.json"
    api_keys.add(path, "one")
    return path


def secret(name: str) -> str:
    return f"the key of {name}"


def test_without_api_keys_anyone_may_generate_and_ablate() -> None:
    keys = made(admin_key="root")
    assert keys.is_open
    assert [keys.caller(key) for key in (None, "x", "root")] == [ANYONE, ANYONE, ADMIN]


def test_with_api_keys_a_request_without_one_is_nobodys() -> None:
    keys = made(api_keys="a,b")
    assert not keys.is_open
    assert [keys.caller(key) for key in (None, "x", "", "a,b")] == [NOBODY] * 4


def test_each_key_of_the_settings_is_a_caller_of_its_own_whatever_the_order_of_the_list() -> None:
    first, second = made(api_keys="a,b"), made(api_keys="b,a")
    assert first.caller("a") == second.caller("a")
    assert first.caller("a").name != first.caller("b").name
    assert first.caller("a").cache_salt != first.caller("b").cache_salt
    assert first.caller("a").scopes == ANYONE.scopes


def test_an_owners_things_exist_for_the_owner_and_for_an_admin_only() -> None:
    keys = made(api_keys="a,b", admin_key="root")
    owner = keys.caller("a")
    seen = [keys.caller(key).may_see(owner.name) for key in ("a", "b", "root")]
    assert seen == [True, False, True]
    assert not NOBODY.may_see(owner.name)


def test_a_file_of_keys_closes_the_server_and_its_keys_open_it(file: Path) -> None:
    api_keys.add(file, "two", "ablate", tasks=["legal"], tenant="acme", max_concurrent=1)
    keys = made(keys_file=file, api_keys="env", admin_key="root")
    assert not keys.is_open
    assert keys.caller(None) == NOBODY
    two = keys.caller(secret("two"))
    assert (two.name, two.tenant, two.scopes) == ("two", "acme", {Scope.ABLATE})
    assert (two.tasks, two.limits.max_concurrent) == ({"legal"}, 1)
    assert keys.caller("env").scopes == ANYONE.scopes
    assert keys.caller("root") == ADMIN
    assert keys.is_restricted


def test_keys_of_one_tenant_share_a_salt_and_no_others_do(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    for name, tenant in (("a", "acme"), ("b", "acme"), ("c", None), ("acme", None), ("d", "c")):
        api_keys.add(file, name, tenant=tenant)
    keys = made(keys_file=file)
    salts = {name: keys.caller(secret(name)).cache_salt for name in ("a", "b", "c", "acme", "d")}
    assert salts["a"] == salts["b"]
    assert len({*salts.values(), ANYONE.cache_salt, ADMIN.cache_salt}) == 6


def test_an_admin_key_of_the_file_turns_admin_routes_on(file: Path) -> None:
    keys = made(keys_file=file)
    assert not keys.has_admin
    api_keys.add(file, "boss", "admin")
    keys.refresh()
    assert keys.has_admin


def test_a_change_of_the_file_counts_once_it_is_read_again_and_is_an_act(file: Path) -> None:
    keys = made(keys_file=file)
    api_keys.add(file, "two")
    KeyFile(file).revoke("one")
    assert keys.caller(secret("one")).name == "one"
    acts = keys.refresh()
    assert keys.caller(secret("one")) == NOBODY
    assert keys.caller(secret("two")).name == "two"
    assert [(act.what, act.about["key"]) for act in acts] == [
        ("revoke key", "one"),
        ("add key", "two"),
    ]
    assert keys.refresh() == []


@pytest.mark.parametrize("damage", ["missing", "damaged", "empty"])
def test_keys_stay_as_they_were_while_the_file_is_damaged_or_gone(
    file: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    keys = made(keys_file=file)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else b"{")
    caplog.set_level(logging.ERROR, "server")
    keys.refresh()
    keys.refresh()
    assert keys.caller(secret("one")).name == "one"
    assert len(caplog.records) == 1
    file.write_bytes(content)
    api_keys.add(file, "two")
    keys.refresh()
    assert keys.caller(secret("two")).name == "two"


def test_a_server_does_not_start_on_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crma keys add") as caught:
        made(keys_file=tmp_path / "keys.json")
    assert caught.value.field == "keys_file"


async def test_a_running_server_reads_the_file_again_and_the_change_is_audited(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("server.service.keys.POLL_S", 0.001)
    database = Database(tmp_path / "kept")
    audit = Audit(AuditLog(tmp_path / "audit"), database, Metrics(CollectorRegistry()))
    keys = made(audit, keys_file=file)
    keys.start()
    KeyFile(file).revoke("one")
    async with asyncio.timeout(10):
        while not (acts := await audit.newest(Filter(), 10)):
            await asyncio.sleep(0.001)
    await keys.stop()
    assert keys.caller(secret("one")) == NOBODY
    assert [(act["who"], act["what"], act["object"]) for act in acts] == [
        ("file of keys", "revoke key", "one")
    ]
    assert json.loads((tmp_path / "audit").read_text())["key"] == "one"
    database.close()
