"""CRMA_REQUIRE_SIGNATURE: a server whose store must be signed."""

from pathlib import Path

import pytest
from admin import ADMIN, lora, upload
from api import Serve, Served
from signing_keys import Keys, make_keys

from crma.store.adapter_store import AdapterStore
from crma.store.signing import sign_versions


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "own")


@pytest.fixture
async def served(serve: Serve, own: AdapterStore, keys: Keys, peft: Path) -> Served:
    """medical and the backbone are signed, legal is not."""
    sign_versions(own, keys.private, ["backbones/v1", "tasks/medical/v1"])
    return await serve(
        store=own.root,
        require_signature=keys.public,
        admin_key="root",
        import_roots=str(peft.parent),
    )


async def test_an_unsigned_task_is_refused_by_name_and_the_others_serve(served: Served) -> None:
    """Whoever could write to the store could let the server answer with any adapter."""
    assert await served.error(task="legal") == (409, "not_signed")
    assert (await served.generate(task="medical")).status_code == 200
    body = (await served.client.get("/readyz")).json()
    assert "tasks/legal/v1: not signed" in body["problems"]["legal"]
    metrics = (await served.client.get("/metrics")).text
    assert "crma_tasks_unable 1.0" in metrics


async def test_a_signature_that_arrives_lets_the_task_serve(
    served: Served, own: AdapterStore, keys: Keys
) -> None:
    sign_versions(own, keys.private)
    await served.app.state.frontend.registry.refresh()
    assert (await served.generate(task="legal")).status_code == 200


async def test_a_signature_of_another_key_stops_it(
    served: Served, own: AdapterStore, tmp_path: Path
) -> None:
    other = make_keys(tmp_path, "other")
    sign_versions(own, other.private, ["tasks/medical/v1"])
    await served.app.state.frontend.registry.refresh()
    assert await served.error(task="medical") == (409, "not_signed")


async def test_nothing_is_published_over_http_because_the_server_cannot_sign(
    served: Served, own: AdapterStore, peft: Path
) -> None:
    before = own.channels()
    response = await upload(served, peft, {"name": "medical"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "not_signed")
    response = await lora(served, "load", "new", lora_path=str(peft))
    assert (response.status_code, response.json()["error"]["code"]) == (409, "not_signed")
    assert own.channels() == before
    listed = await served.client.get("/adapters", headers=ADMIN)
    assert {task["name"] for task in listed.json()["tasks"]} >= {"medical"}
