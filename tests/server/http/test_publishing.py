"""Imports from a path, vLLM's LoRA routes and deletion, on a real store; and who may use them."""

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from admin import ADMIN, contents, delete, lora, upload
from api import BASE, Serve, Served

from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES
from server.service import publisher
from server.service.audit import STORE

WEIGHTS = TASK_FILES[1]


@pytest.fixture
async def served(serve: Serve, own: AdapterStore, peft: Path) -> Served:
    return await serve(store=own.root, admin_key="root", import_roots=str(peft.parent))


async def test_vllms_routes_add_a_lora_from_a_path_and_take_it_out(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    response = await lora(served, "load", "new", lora_path=str(peft))
    assert (response.status_code, response.text) == (
        200,
        "Success: LoRA adapter 'new' added successfully.",
    )
    models = (await served.client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in models] == ["base", "legal", "medical", "new"]
    assert (await served.generate(task="new")).status_code == 200
    response = await lora(served, "unload", "new", lora_int_id=None)
    assert (response.status_code, response.text) == (
        200,
        "Success: LoRA adapter 'new' removed successfully.",
    )
    assert await served.error(task="new") == (404, "not_found")
    assert own.task("new", "v1").version == "v1"
    assert served.engine.resident() == ()
    response = await lora(served, "unload", "new")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "lora_name"


async def test_a_task_that_serves_is_replaced_only_in_place(served: Served, peft: Path) -> None:
    before = (await served.generate(task="medical")).json()["provenance"]["task"]
    response = await lora(served, "load", "medical", lora_path="new")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "adapter_exists"
    assert "load_inplace" in response.json()["error"]["message"]
    assert (await served.generate(task="medical")).json()["provenance"]["task"] == before
    response = await lora(served, "load", "medical", lora_path="new", load_inplace=True)
    assert response.status_code == 200
    assert (await served.generate(task="medical")).json()["provenance"]["task"] != before


async def test_a_path_outside_the_import_roots_is_refused(
    served: Served, own: AdapterStore, peft: Path, tmp_path: Path
) -> None:
    outside = own.task("legal").path
    (peft.parent / "link").symlink_to(outside)
    (peft.parent / "linked").mkdir()
    for name in TASK_FILES:
        (peft.parent / "linked" / name).symlink_to(outside / name)
    before = contents(own)
    for path in (str(outside), "../store/tasks/legal/v1", "link", "linked", "/", "a\0b"):
        response = await lora(served, "load", "stolen", lora_path=path)
        assert response.status_code == 422, path
        assert response.json()["error"]["param"] == "lora_path"
    response = await lora(served, "load", "stolen", lora_path="nothing")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "lora_path")
    assert contents(own) == before


async def test_importing_from_a_path_is_off_without_an_import_root(
    serve: Serve, own: AdapterStore, peft: Path
) -> None:
    served = await serve(store=own.root, admin_key="root")
    response = await lora(served, "load", "new", lora_path=str(peft))
    assert response.status_code == 403
    assert response.json()["error"]["param"] == "CRMA_IMPORT_ROOTS"


# Going back -----------------------------------------------------------------------------------


async def roll_back(served: Served, task: str) -> httpx.Response:
    return await served.client.post(f"/adapters/{task}/rollback", headers=ADMIN)


async def test_a_task_goes_back_to_the_version_that_served_before(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    first = (await upload(served, peft)).json()
    second = (await upload(served, peft)).json()
    assert second["version"] == "v2"
    response = await roll_back(served, "new")
    assert (response.status_code, response.json()) == (200, first)
    assert own.channels().tasks["new"] == "v1"
    shown = (await served.client.get("/adapters/new")).json()
    assert shown["serving"] == "v1"
    assert [(each["version"], each["serves"]) for each in shown["versions"]] == [
        ("v1", True),
        ("v2", False),
    ]
    assert [(each["action"], each["from"], each["to"]) for each in shown["history"]] == [
        ("serve", None, "v1"),
        ("serve", "v1", "v2"),
        ("roll_back", "v2", "v1"),
    ]


@pytest.mark.parametrize("task", ["nowhere", "legal", "legal@v1"])
async def test_a_task_without_an_earlier_version_cannot_go_back(served: Served, task: str) -> None:
    response = await roll_back(served, task)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert (await served.generate(task="legal")).status_code == 200


# Deletion -------------------------------------------------------------------------------------


async def test_a_task_is_deleted_once_it_no_longer_serves(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    before = contents(own)
    await upload(served, peft)
    await upload(served, peft)
    for task in ("new", "new@v2"):
        response = await delete(served, task)
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "adapter_serves"
        assert "first" in response.json()["error"]["message"]
        assert "unload_lora_adapter" in response.json()["error"]["allowed"]
    assert (await delete(served, "new@v1")).json() == {"name": "new", "deleted": ["v1"]}
    assert await served.error(task="new@v1") == (404, "not_found")
    assert (await served.generate(task="new")).status_code == 200
    await lora(served, "unload", "new")
    assert (await delete(served, "new")).json() == {"name": "new", "deleted": ["v2"]}
    assert contents(own) == before
    assert own.verify(base=BASE) == []
    assert (await upload(served, peft)).json()["version"] == "v3", "a number is not given twice"


@pytest.mark.parametrize("task", ["nowhere", "legal@v9", "legal@", "Legal", "legal@x", "@v1", "@"])
async def test_what_does_not_exist_cannot_be_deleted(served: Served, task: str) -> None:
    response = await delete(served, task)
    assert response.status_code == 404, response.text
    assert response.json()["error"]["code"] == "not_found"
    assert response.json()["error"]["field"] == "task"


async def test_requests_that_run_or_wait_with_a_deleted_adapter_get_their_answers(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    """The second has been accepted, and its adapter not been loaded, when the files go."""
    await upload(served, peft)
    load, started, go = served.engine._load, asyncio.Event(), asyncio.Event()

    async def wait_and_load(request: Any) -> None:
        started.set()
        await go.wait()
        await load(request)

    served.engine._load = wait_and_load
    waiting = asyncio.create_task(served.generate(task="new"))
    await started.wait()
    await lora(served, "unload", "new")
    assert (await delete(served, "new")).status_code == 200
    go.set()
    assert (await waiting).json()["text"] == "one two"


async def test_a_pinned_adapter_that_is_taken_out_leaves_memory(served: Served, peft: Path) -> None:
    await upload(served, peft)
    await served.client.post("/adapters/new/pin", headers=ADMIN)
    assert len(served.engine.resident()) == 1
    await lora(served, "unload", "new")
    assert served.engine.resident() == ()


async def test_an_adapter_that_another_task_serves_too_stays_in_memory(
    served: Served, peft: Path
) -> None:
    """Two names of one content are one adapter."""
    await upload(served, peft)
    await upload(served, peft, {"name": "same"})
    await served.client.post("/adapters/same/pin", headers=ADMIN)
    await lora(served, "unload", "new")
    await delete(served, "new")
    assert len(served.engine.resident()) == 1
    served.engine.pool.unpin(served.engine.resident()[0])
    await served.client.post("/adapters/same/unload", headers=ADMIN)
    assert (await served.generate(task="same")).status_code == 200


async def test_a_damaged_version_can_be_deleted(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    await upload(served, peft)
    await upload(served, peft)
    tiny.flip_bit(own.root / "tasks" / "new" / "v1" / WEIGHTS)
    (own.root / "tasks" / "new" / "v1" / "manifest.json").write_text("{")
    assert (await delete(served, "new@v1")).status_code == 200
    assert own.verify(base=BASE) == []


# All of them ----------------------------------------------------------------------------------


async def test_every_change_is_a_line_of_the_audit_log(
    served: Served, peft: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.audit")
    await upload(served, peft)
    await lora(served, "unload", "new")
    await delete(served, "new")
    await delete(served, "nowhere")
    every = [record for record in caplog.records if record.name == "server.audit"]
    records = [record for record in every if record.fields["who"] != STORE]
    lines = [(record.message, record.fields["task"], record.fields["result"]) for record in records]
    assert lines == [
        ("publish", "new", "done"),
        ("stop", "new", "done"),
        ("delete", "new", "done"),
        ("delete", "nowhere", "not_found"),
    ]
    assert {record.fields["who"] for record in records} == {"admin"}
    assert records[0].fields["version"] == "v1"
    assert records[0].fields["digest"].startswith("sha256:")
    assert records[2].fields["versions"] == ("v1",)


async def test_changes_need_the_admin_key(serve: Serve, own: AdapterStore, peft: Path) -> None:
    before = contents(own)
    roots = {"store": own.root, "import_roots": str(peft.parent)}
    keyless = await serve(**roots)
    served = await serve(admin_key="root", api_keys="user", **roots)
    user = {"Authorization": "Bearer user"}
    for server, headers, status in ((keyless, ADMIN, 403), (served, {}, 401), (served, user, 403)):
        body = {"lora_name": "legal", "lora_path": "new"}
        answers = [
            await upload(server, peft, headers=headers),
            await server.client.delete("/adapters/legal", headers=headers),
            await server.client.post("/v1/load_lora_adapter", json=body, headers=headers),
            await server.client.post(
                "/v1/unload_lora_adapter", json={"lora_name": "legal"}, headers=headers
            ),
        ]
        assert [answer.status_code for answer in answers] == [status] * 4
    assert contents(own) == before


async def test_a_change_does_not_wait_for_ever_behind_a_file_system_that_hangs(
    served: Served, own: AdapterStore, peft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change after it used to wait as long as the first."""
    monkeypatch.setattr(publisher, "TURN_S", 0.05)
    goes_on = threading.Event()
    reader = served.app.state.frontend.registry._reader
    before = contents(own)
    with monkeypatch.context() as hanging:
        hanging.setattr(reader, "has_changed", lambda: goes_on.wait(20))
        answers = await asyncio.gather(upload(served, peft), delete(served, "legal"))
        goes_on.set()
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_busy")
        assert answer.headers["Retry-After"] == "10"
    assert contents(own) == before
    monkeypatch.setattr(publisher, "TURN_S", 20.0)
    assert (await upload(served, peft)).status_code == 201


async def test_changes_wait_until_the_store_is_verified(
    serve: Serve, own: AdapterStore, peft: Path
) -> None:
    served = await serve(store=own.root, admin_key="root", wait=False)
    response = await upload(served, peft)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    await served.app.state.starting
    served.app.state.frontend.draining = True
    assert (await delete(served, "legal")).json()["error"]["code"] == "draining"
