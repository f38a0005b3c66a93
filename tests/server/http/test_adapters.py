"""GET /adapters and the admin routes: what is shown, and who may do what."""

from pathlib import Path

import pytest
from api import BASE, Serve, Served

from server.http.schemas import EXAMPLES

ADMIN = {"Authorization": "Bearer root"}
USER = {"Authorization": "Bearer user"}


async def test_the_listing_is_as_the_contract_says(served: Served) -> None:
    body = (await served.client.get("/adapters")).json()
    example = EXAMPLES["/adapters"]["answers"]["application/json"]["example"]
    assert [list(body), list(body["tasks"][0])] == [list(example), list(example["tasks"][0])]
    assert body["base"] == {
        "name": "tiny",
        "digest": BASE.digest,
        "dtype": "float32",
        "max_model_len": 128,
    }
    assert body["backbone"]["certificate"]["holds"] is True
    legal, medical = body["tasks"]
    assert (legal["name"], legal["lineage"]) == ("legal", None)
    assert (medical["version"], medical["lineage"]) == ("v1", body["backbone"]["digest"])
    assert (medical["rank"], medical["scaling"], "q_proj" in medical["target_modules"]) == (
        4,
        2.0,
        True,
    )
    assert (medical["measured"], medical["resident"]) == ({"accuracy": 0.5}, False)


async def test_api_keys(serve: Serve) -> None:
    served = await serve(api_keys="user,other", admin_key="root")
    for headers in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": "Basic user"}):
        response = await served.client.post("/generate", json={"prompt": "Hi"}, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert (await served.client.get("/adapters", headers=headers)).status_code == 401
    for headers in (USER, ADMIN, {"Authorization": "Bearer other"}):
        assert (
            await served.client.post("/generate", json={"prompt": "Hi"}, headers=headers)
        ).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert (await served.client.get(path)).status_code == 200


@pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin"])
async def test_admin_routes_need_the_admin_key(serve: Serve, action: str) -> None:
    path = f"/adapters/medical/{action}"
    assert (await (await serve()).client.post(path, headers=ADMIN)).status_code == 403
    served = await serve(api_keys="user", admin_key="root")
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer x"}, 401),
        (USER, 403),
        (ADMIN, 200),
    ):
        assert served.engine.resident() == ()
        assert (await served.client.post(path, headers=headers)).status_code == status
    assert (await served.client.post(f"/adapters/x/{action}", headers=ADMIN)).status_code == 404
    counted = f'crma_http_responses_total{{route="/adapters/{{task}}/{action}",status="200"}} 1.0'
    assert counted in await served.metrics()


async def test_an_adapter_in_use_is_unloaded_as_asked(serve: Serve) -> None:
    """A request uses it until the engine is told to cancel those that do."""
    served = await serve(admin_key="root", request_timeout_s=0.01)
    registry, cancelled = served.app.state.frontend.registry, []
    pool, selection = served.engine.pool, registry.resolve("medical", False).selection

    def cancel(digest: str) -> None:
        cancelled.append(digest)
        pool.release(selection)

    async def post(action: str) -> tuple[int, str]:
        response = await served.client.post(f"/adapters/medical/{action}", headers=ADMIN)
        body = response.json()
        return response.status_code, body["error"]["code"] if "error" in body else str(
            body["resident"]
        )

    served.engine.on_cancel = cancel
    assert await post("load") == (200, "True")
    assert pool.acquire(selection)
    for query in ("", "?when_in_use=refuse", "?when_in_use=wait"):
        assert await post(f"unload{query}") == (409, "adapter_in_use")
    assert await post("unload?when_in_use=Wait") == (422, "invalid_field")
    assert await post("unload?when_used=wait") == (422, "invalid_field")
    assert (await post("pin"), cancelled) == ((200, "True"), [])
    assert await post("unload?when_in_use=cancel") == (409, "adapter_in_use")
    assert (await post("unpin"), cancelled) == ((200, "True"), []), (
        "nobody is cancelled for what is pinned"
    )
    assert await post("unload?when_in_use=cancel") == (200, "False")
    assert cancelled == [selection.task_digest]


async def test_an_empty_store_serves_the_base(serve: Serve, tmp_path: Path) -> None:
    served = await serve(store=tmp_path / "nothing")
    body = (await served.client.get("/adapters")).json()
    assert (body["backbone"], body["tasks"]) == (None, [])
    assert (await served.generate()).status_code == 200
    error = (await served.generate(crma=True)).json()["error"]
    assert (error["code"], error["field"], error["allowed"]) == ("no_backbone", "crma", False)
