"""Web pages of other origins: off unless they are listed, and then also for errors."""

import httpx
import pytest
from api import Serve, Served

from crma.core.errors import ConfigError
from server.settings import Settings

PAGE = "https://app.example"
ALLOWED = "access-control-allow-origin"


async def preflight(served: Served, origin: str = PAGE) -> httpx.Response:
    """What a browser asks, without a key, before it sends a request with one."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
    }
    return await served.client.options("/v1/chat/completions", headers=headers)


async def test_no_page_may_call_the_server_unless_its_origin_is_listed(serve: Serve) -> None:
    for served in (await serve(), await serve(cors_origins="https://other.example")):
        assert ALLOWED not in (await preflight(served)).headers
        response = await served.client.get("/healthz", headers={"Origin": PAGE})
        assert response.status_code == 200
        assert ALLOWED not in response.headers


async def test_a_listed_origin_passes_the_preflight_without_a_key(serve: Serve) -> None:
    served = await serve(cors_origins=f"https://other.example, {PAGE}", api_keys="user")
    response = await preflight(served)
    assert response.status_code == 200
    assert response.headers[ALLOWED] == PAGE
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in response.headers


async def test_errors_can_be_read_by_the_page_too(serve: Serve) -> None:
    served = await serve(cors_origins=PAGE, api_keys="user")
    origin = {"Origin": PAGE}
    key = {"Authorization": "Bearer user", **origin}
    post = served.client.post
    answers = {
        401: await post("/generate", json={"prompt": "Hi"}, headers=origin),
        404: await served.client.get("/nowhere", headers=origin),
        422: await post("/generate", json={"prompt": ""}, headers=key),
    }
    served.engine.refusal = ValueError("inside")
    answers[500] = await post("/generate", json={"prompt": "Hi"}, headers=key)
    for status, response in answers.items():
        assert response.status_code == status
        assert response.headers[ALLOWED] == PAGE, status
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]


async def test_a_star_lets_every_page_call(serve: Serve) -> None:
    served = await serve(cors_origins="*")
    assert (await preflight(served)).headers[ALLOWED] == "*"


@pytest.mark.parametrize("origin", ["app.example", f"{PAGE}/", f"{PAGE}/a", "https://*.example"])
def test_what_is_no_origin_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setenv("CRMA_CORS_ORIGINS", f"{PAGE},{origin}")
    with pytest.raises(ConfigError, match="no origin") as caught:
        Settings.load()
    assert caught.value.field == "CRMA_CORS_ORIGINS"
