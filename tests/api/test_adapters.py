"""GET /adapters and the admin routes: what is shown, who may do what, and that bad adapters stay out alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.schemas import AdaptersResponse

from .conftest import BASE, Serve, Served

ADMIN = {"Authorization": "Bearer root"}
USER = {"Authorization": "Bearer user"}


async def test_the_listing_is_as_the_contract_says(served: Served) -> None:
    body = (await served.client.get("/adapters")).json()
    AdaptersResponse.model_validate(body)
    assert body["base"] == {"name": "tiny", "digest": BASE.digest, "dtype": "float32", "max_model_len": 128}
    assert body["backbone"]["certificate"]["holds"] is True
    legal, medical = body["tasks"]
    assert (legal["name"], legal["lineage"]) == ("legal", None)
    assert (medical["version"], medical["lineage"]) == ("v1", body["backbone"]["digest"])
    assert (medical["rank"], medical["scaling"], medical["target_modules"]) == (2, 2.0, ["q_proj"])
    assert medical["measured"] == {"accuracy": 0.5}
    assert medical["resident"] is False


async def test_api_keys(serve: Serve) -> None:
    served = await serve(api_keys="user,other", admin_key="root")
    for headers in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": "Basic user"}):
        response = await served.client.post("/generate", json={"prompt": "Hi"}, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert (await served.client.get("/adapters", headers=headers)).status_code == 401
    for headers in (USER, ADMIN, {"Authorization": "Bearer other"}):
        assert (await served.client.post("/generate", json={"prompt": "Hi"}, headers=headers)).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert (await served.client.get(path)).status_code == 200


@pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin"])
async def test_admin_routes_need_the_admin_key(serve: Serve, action: str) -> None:
    path = f"/adapters/medical/{action}"
    closed = await serve()
    assert (await closed.client.post(path, headers=ADMIN)).status_code == 403
    served = await serve(api_keys="user", admin_key="root")
    statuses = [
        (await served.client.post(path, headers=h)).status_code for h in ({}, {"Authorization": "Bearer x"}, USER)
    ]
    assert statuses == [401, 401, 403]
    assert served.pool.loaded == set()
    assert (await served.client.post(path, headers=ADMIN)).status_code == 200
    assert (await served.client.post(f"/adapters/x/{action}", headers=ADMIN)).status_code == 404
    counted = f'crma_http_responses_total{{route="/adapters/{{task}}/{action}",status="200"}} 1.0'
    assert counted in (await served.client.get("/metrics")).text


async def test_pinned_adapters_stay_until_unpinned(serve: Serve) -> None:
    served = await serve(admin_key="root")

    async def call(action: str) -> tuple[int, bool | None]:
        response = await served.client.post(f"/adapters/medical@v2/{action}", headers=ADMIN)
        return response.status_code, response.json().get("resident")

    assert [await call(a) for a in ("load", "unload", "pin", "pin")] == [
        (200, True),
        (200, False),
        (200, True),
        (200, True),
    ]
    assert len(served.pool.pins) == 1
    assert (await call("unload"))[0] == 409
    assert [await call(a) for a in ("unpin", "unpin", "unload")] == [(200, True), (200, True), (200, False)]


async def test_a_damaged_adapter_is_refused_with_its_reason_and_the_rest_serve(serve: Serve, root: Path) -> None:
    weights = root / "tasks/medical/v1/adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(damaged)
    served = await serve()
    response = await served.generate(task="medical")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "digest_mismatch")
    assert (await served.generate(task="medical@v2")).status_code == 200
    assert (await served.generate(task="legal")).status_code == 200
    assert (await served.client.get("/readyz")).status_code == 200
    assert [t["name"] for t in (await served.client.get("/adapters")).json()["tasks"]] == ["legal"]
    assert "crma_adapter_verification_failures_total 1.0" in (await served.client.get("/metrics")).text


async def test_an_empty_store_serves_the_base(serve: Serve, tmp_path: Path) -> None:
    served = await serve(store=tmp_path / "nothing")
    body = (await served.client.get("/adapters")).json()
    assert (body["backbone"], body["tasks"]) == (None, [])
    assert (await served.generate()).status_code == 200
    assert (await served.generate(crma=True)).json()["error"]["code"] == "no_backbone"
