"""From a key that was sent to its caller."""

from server.service.caller import ADMIN, ANYONE, NOBODY
from server.service.keys import Keys
from server.settings import Settings


def test_without_api_keys_anyone_may_generate_and_ablate() -> None:
    keys = Keys(Settings(admin_key="root"))
    assert keys.is_open
    assert [keys.caller(key) for key in (None, "x", "root")] == [ANYONE, ANYONE, ADMIN]


def test_with_api_keys_a_request_without_one_is_nobodys() -> None:
    keys = Keys(Settings(api_keys="a,b"))
    assert not keys.is_open
    assert [keys.caller(key) for key in (None, "x", "", "a,b")] == [NOBODY] * 4


def test_each_key_of_the_settings_is_a_caller_of_its_own_whatever_the_order_of_the_list() -> None:
    first, second = Keys(Settings(api_keys="a,b")), Keys(Settings(api_keys="b,a"))
    assert first.caller("a") == second.caller("a")
    assert first.caller("a").name != first.caller("b").name
    assert first.caller("a").tenant != first.caller("b").tenant
    assert first.caller("a").scopes == ANYONE.scopes


def test_an_owners_things_exist_for_the_owner_and_for_an_admin_only() -> None:
    keys = Keys(Settings(api_keys="a,b", admin_key="root"))
    owner = keys.caller("a")
    assert [keys.caller(key).may_see(owner.name) for key in ("a", "b", "root")] == [
        True,
        False,
        True,
    ]
    assert not NOBODY.may_see(owner.name)
