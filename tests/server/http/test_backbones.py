"""The backbone over HTTP: its history, the way back, and the gate in a process of its own."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import api_keys
import httpx
import pytest
import tiny
from admin import ADMIN
from api import BASE, Serve

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from server.service import promoter

UNGATED = {"allow_ungated": ["medical"]}  # the tiny store has no validation data


async def test_versions_and_history_are_those_of_the_store(serve: Serve, own: AdapterStore) -> None:
    first = own.backbone()
    tiny.publish_backbone(own, BASE, 1, lineage=[first.digest], serve=False)
    served = await serve(store=own.root)
    body = (await served.client.get("/backbones")).json()
    assert body["serving"] == "v1"
    assert [each["version"] for each in body["versions"]] == ["v1", "v2"]
    assert [each["serves"] for each in body["versions"]] == [True, False]
    assert body["versions"][1]["lineage"] == [first.digest]
    assert [(each["from"], each["to"]) for each in body["history"]] == [(None, "v1")]


async def test_a_backbone_is_rolled_back_with_the_tasks_that_need_it(
    serve: Serve, own: AdapterStore
) -> None:
    first = own.backbone()
    second = tiny.publish_backbone(own, BASE, 1, lineage=[first.digest])
    tiny.publish(own, BASE, "new", 3, backbone=second.digest)
    served = await serve(store=own.root, admin_key="root")
    answer = await served.client.post("/backbones/rollback", headers=ADMIN)
    assert (answer.status_code, answer.json()["serving"]) == (200, "v1")
    listed = (await served.client.get("/adapters")).json()
    assert listed["backbone"]["version"] == "v1"
    assert [task["name"] for task in listed["tasks"]] == ["legal", "medical"]
    again = await served.client.post("/backbones/rollback", headers=ADMIN)
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
    acts = (await served.client.get("/audit", headers=ADMIN)).json()
    mine = [act for act in acts if act["who"] == "admin"]
    assert [(act["what"], act["result"]) for act in mine] == [
        ("roll back backbone", "not_found"),
        ("roll back backbone", "done"),
    ]
    assert mine[1]["version"] == "v1"


async def test_evidence_is_only_for_keys_that_may_use_every_task(
    serve: Serve, own: AdapterStore, tmp_path: Path
) -> None:
    """It names every task that was scored."""
    first = own.backbone()
    tiny.publish_backbone(own, BASE, 1, lineage=[first.digest], serve=False)
    evidence: dict[str, Any] = {"lambda": 1.0, "tried": [{"tasks": {"legal": {}}}]}
    task = tiny.publish(own, BASE, "medical", 5, backbone=first.digest, serve=False)
    for channel, version in (("tasks/medical", task.version), ("backbone", "v2")):
        own.set_serving({channel: version}, evidence=evidence)
    file = tmp_path / "keys.json"
    narrow = api_keys.add(file, "narrow", "generate", tasks=["medical"])
    wide = api_keys.add(file, "wide", "generate")
    served = await serve(store=own.root, keys_file=file)
    for path in ("/backbones", "/adapters/medical"):
        seen = (await served.client.get(path, headers=wide)).json()
        assert seen["history"][-1]["evidence"] == evidence
        hidden = await served.client.get(path, headers=narrow)
        assert "legal" not in hidden.text
        assert hidden.json()["history"][-1]["to"] == seen["history"][-1]["to"]


# The gate itself, on the real engine ----------------------------------------------------------


@pytest.fixture
async def client(base: BaseModel, store: AdapterStore) -> AsyncIterator[httpx.AsyncClient]:
    """An administrator's, of a server whose store has a candidate v2."""
    first = store.backbone()
    tiny.publish_backbone(store, base, 1, lineage=[first.digest], serve=False)
    headers = {"Authorization": "Bearer admin"}
    async with tiny.serving(base, store.root) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers
        ) as client:
            yield client


async def ended(client: httpx.AsyncClient) -> dict[str, Any]:
    """The promotion that was started, once it has ended."""
    async with asyncio.timeout(120):
        while True:
            found = (await client.get("/backbones/promotion")).raise_for_status().json()
            if found["status"] != "running":
                return found
            await asyncio.sleep(0.05)


@pytest.mark.e2e
async def test_a_dry_run_shows_its_evidence_and_the_promotion_after_it_serves(
    client: httpx.AsyncClient, store: AdapterStore
) -> None:
    assert (await client.get("/backbones/promotion")).status_code == 404
    started = await client.post("/backbones/v2/promote", json=UNGATED)
    assert (started.status_code, started.json()["status"]) == (202, "running")
    busy = await client.post("/backbones/v2/promote", json=UNGATED)
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "promotion_runs")
    dry = await ended(client)
    assert (dry["status"], dry["error"], dry["dry_run"]) == ("done", None, True)
    assert dry["evidence"]["lambda"] == 1
    assert list(dry["evidence"]["ungated"]) == ["medical"]
    assert "a dry run: nothing has changed" in dry["lines"]
    assert (await client.get("/backbones")).json()["serving"] == "v1"
    await client.post("/backbones/v2/promote", json={**UNGATED, "dry_run": False})
    assert (await ended(client))["evidence"]["lambda"] == 1
    shown = (await client.get("/backbones")).json()
    assert shown["serving"] == "v2"
    assert shown["history"][-1]["evidence"]["candidate"] == store.backbone().digest
    assert (await client.get("/adapters")).json()["backbone"]["version"] == "v2"


@pytest.mark.e2e
async def test_a_candidate_that_cannot_be_judged_fails_with_the_words_of_the_command(
    client: httpx.AsyncClient,
) -> None:
    unknown = await client.post("/backbones/v3/promote", json={})
    assert (unknown.status_code, unknown.json()["error"]["field"]) == (404, "version")
    wrong = await client.post("/backbones/v2/promote", json={"margin": -1})
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "margin")
    await client.post("/backbones/v2/promote", json={})
    failed = await ended(client)
    assert (failed["status"], failed["evidence"]) == ("failed", None)
    assert "medical cannot be scored" in failed["error"]


async def test_a_promotion_is_cancelled_and_its_process_ends(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo started >&2; exec sleep 600"
    monkeypatch.setattr(promoter, "COMMAND", ("sh", "-c", script))
    await client.post("/backbones/v2/promote", json={})
    async with asyncio.timeout(20):
        while (await client.get("/backbones/promotion")).json()["lines"] != ["started"]:
            await asyncio.sleep(0.05)
    cancelled = await client.delete("/backbones/promotion")
    assert cancelled.json()["status"] == "cancelled"
    assert (await client.get("/backbones/promotion")).json()["status"] == "cancelled"
    assert (await client.post("/backbones/v2/promote", json={})).status_code == 202
