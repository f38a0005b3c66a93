"""DNS rebinding: a server without keys answers under its own names only."""

import pytest
from api import Serve

OWN = ["localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1:8000", "[::1]:8000", ""]
EVIL = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "a@b", "["]


@pytest.mark.parametrize("path", ["/generate", "/v1/models", "/metrics", "/docs", "/nowhere"])
@pytest.mark.parametrize("host", EVIL)
async def test_a_foreign_name_is_refused_on_a_server_without_keys(
    serve: Serve, host: str, path: str
) -> None:
    """A page at evil.example, whose name leads to 127.0.0.1, read answers as its own."""
    served = await serve()
    response = await served.client.get(path, headers={"Host": host})
    assert response.status_code == 421
    error = response.json()["error"]
    assert error["code"] == "wrong_host"
    assert "CRMA_ALLOWED_HOSTS" in error["message"]
    assert "X-Request-Id" in response.headers
    assert 'status="421"' in await served.metrics()


async def test_its_own_names_and_addresses_are_allowed(serve: Serve) -> None:
    served = await serve(host="gpu.local", allowed_hosts="test,api.example")
    for host in (*OWN, "192.168.1.5:8000", "gpu.local:80", "api.example", "API.example"):
        response = await served.client.get("/healthz", headers={"Host": host})
        assert response.status_code == 200, host


async def test_with_keys_and_with_a_star_any_name_will_do(serve: Serve) -> None:
    """A page cannot send a key that it does not have."""
    for options in ({"api_keys": "key"}, {"allowed_hosts": "*"}):
        served = await serve(**options)
        response = await served.client.get("/healthz", headers={"Host": EVIL[0]})
        assert response.status_code == 200
