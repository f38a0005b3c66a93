"""GET /adapters and the admin routes: the listing, the keys, and unloading while in use."""

import json
import shutil
from pathlib import Path

import pytest
from api import BASE, Serve, Served

from crma.store.adapter_store import AdapterStore
from crma.store.manifest import MANIFEST
from server.http.body import EXAMPLES

ADMIN = {"Authorization": "Bearer root"}
USER = {"Authorization": "Bearer user"}


async def test_the_listing_has_the_documented_fields_and_the_stores_values(served: Served) -> None:
    body = (await served.client.get("/adapters")).json()
    example = EXAMPLES["/adapters"]["answers"]["application/json"]["example"]
    assert list(body) == list(example)
    assert list(body["tasks"][0]) == list(example["tasks"][0])
    assert body["base"] == {
        "name": "tiny",
        "digest": BASE.digest,
        "dtype": "float32",
        "max_model_len": 128,
    }
    assert body["backbone"]["certificate"]["holds"] is True
    legal, medical = body["tasks"]
    assert legal["name"] == "legal"
    assert legal["lineage"] is None
    assert medical["version"] == "v1"
    assert medical["lineage"] == body["backbone"]["digest"]
    assert medical["rank"] == 4
    assert medical["scaling"] == 2.0
    assert "q_proj" in medical["target_modules"]
    assert medical["measured"] == {"accuracy": 0.5}
    assert medical["resident"] is False


async def test_a_task_shows_its_versions_and_why_one_may_not_serve(
    serve: Serve, own: AdapterStore
) -> None:
    manifest = own.root / "tasks" / "medical" / "v1" / MANIFEST
    folder = own.root / "tasks" / "medical" / "v2"
    shutil.copytree(manifest.parent, folder)
    served = await serve(store=own.root)
    body = (await served.client.get("/adapters/medical")).json()
    listed = (await served.client.get("/adapters")).json()["tasks"][1]
    sound, damaged = body["versions"]
    assert listed.items() <= sound.items()
    assert (sound["serves"], sound["problem"]) == (True, None)
    assert sound["trained_on"] == json.loads(manifest.read_text())["trained_on"]
    assert (damaged["version"], damaged["serves"]) == ("v2", False)
    assert damaged["problem"]
    assert body["history"][0]["to"] == "v1"
    unknown = await served.client.get("/adapters/nowhere")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


async def test_every_route_but_health_metrics_and_documentation_needs_an_api_key(
    serve: Serve,
) -> None:
    served = await serve(api_keys="user,other", admin_key="root")
    prompt = {"prompt": "Hi"}
    for headers in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": "Basic user"}):
        response = await served.client.post("/generate", json=prompt, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "unauthorized"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert (await served.client.get("/adapters", headers=headers)).status_code == 401
    for headers in (USER, ADMIN, {"Authorization": "Bearer other"}):
        response = await served.client.post("/generate", json=prompt, headers=headers)
        assert response.status_code == 200
    open_paths = ("/healthz", "/readyz", "/health", "/ping", "/version")
    for path in (*open_paths, "/metrics", "/docs", "/openapi.json"):
        assert (await served.client.get(path)).status_code == 200


@pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin"])
async def test_admin_routes_need_the_admin_key(serve: Serve, action: str) -> None:
    path = f"/adapters/medical/{action}"
    keyless = await serve()
    assert (await keyless.client.post(path, headers=ADMIN)).status_code == 403
    served = await serve(api_keys="user", admin_key="root")
    unknown_key = {"Authorization": "Bearer x"}
    for headers, status in (({}, 401), (unknown_key, 401), (USER, 403), (ADMIN, 200)):
        assert served.engine.resident() == ()
        assert (await served.client.post(path, headers=headers)).status_code == status
    assert (await served.client.post(f"/adapters/x/{action}", headers=ADMIN)).status_code == 404
    counted = f'crma_http_responses_total{{route="/adapters/{{task}}/{action}",status="200"}} 1.0'
    assert counted in await served.metrics()


async def test_an_adapter_in_use_is_unloaded_only_as_when_in_use_says(serve: Serve) -> None:
    """The adapter stays in use until the engine is told to cancel the requests that use it."""
    served = await serve(admin_key="root", request_timeout_s=0.01)
    pool = served.engine.pool
    selection = served.app.state.frontend.registry.resolve("medical", False).selection
    cancelled: list[str] = []

    def cancel(digest: str) -> None:
        cancelled.append(digest)
        pool.release(selection)

    async def post(action: str) -> tuple[int, str | bool]:
        """The status, and the error's code or whether the adapter is resident."""
        response = await served.client.post(f"/adapters/medical/{action}", headers=ADMIN)
        body = response.json()
        if "error" in body:
            return response.status_code, body["error"]["code"]
        return response.status_code, body["resident"]

    served.engine.on_cancel = cancel
    assert await post("load") == (200, True)
    assert pool.acquire(selection)
    for query in ("", "?when_in_use=refuse", "?when_in_use=wait"):
        assert await post(f"unload{query}") == (409, "adapter_in_use")
    assert await post("unload?when_in_use=Wait") == (422, "invalid_field")
    assert await post("unload?when_used=wait") == (422, "invalid_field")
    assert await post("pin") == (200, True)
    assert await post("unload?when_in_use=cancel") == (409, "adapter_in_use")
    assert await post("unpin") == (200, True)
    assert cancelled == [], "a pin protects the requests that use the adapter"
    assert await post("unload?when_in_use=cancel") == (200, False)
    assert cancelled == [selection.task_digest]


async def test_an_empty_store_serves_the_base_model(serve: Serve, tmp_path: Path) -> None:
    served = await serve(store=tmp_path / "nothing")
    body = (await served.client.get("/adapters")).json()
    assert body["backbone"] is None
    assert body["tasks"] == []
    assert (await served.generate()).status_code == 200
    error = (await served.generate(crma=True)).json()["error"]
    assert error["code"] == "no_backbone"
    assert error["field"] == "crma"
    assert error["allowed"] is False
