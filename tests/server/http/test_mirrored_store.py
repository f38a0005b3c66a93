"""A server on a copy of a store that another machine writes: it serves, and publishes nothing."""

import shutil
from pathlib import Path

import httpx
import pytest
from admin import ADMIN, delete, lora, upload
from api import Serve, Served
from mirrored import ADDRESS, contents, mirrored

from crma.store.adapter_store import AdapterStore


@pytest.fixture
def copy(own: AdapterStore, tmp_path: Path) -> AdapterStore:
    return mirrored(own.root, tmp_path / "copy")


@pytest.fixture
async def served(serve: Serve, copy: AdapterStore, peft: Path) -> Served:
    roots = str(peft.parent)
    return await serve(adapters=copy, admin_key="root", import_roots=roots)


async def test_every_route_that_publishes_says_where_to_publish(
    served: Served, copy: AdapterStore, peft: Path
) -> None:
    before = contents(copy.root)
    rollback = await served.client.post("/adapters/legal/rollback", headers=ADMIN)
    for response in (await upload(served, peft), await delete(served, "legal"), rollback):
        check_refused(response)
    for action, body in (("load", {"lora_path": "new"}), ("unload", {})):
        check_refused(await lora(served, action, "legal", **body))
    assert contents(copy.root) == before
    acts = (await served.client.get("/audit", headers=ADMIN)).json()
    assert [act["result"] for act in acts] == ["read_only_store"] * 5


def check_refused(response: httpx.Response) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (409, "read_only_store")
    assert error["message"].startswith(f"{ADDRESS} is read from here and never changed")


async def test_tasks_and_question_sets_of_the_copy_are_served(served: Served) -> None:
    assert (await served.generate(task="medical", crma=True)).status_code == 200
    sets = (await served.client.get("/question_sets")).json()
    assert [(each["name"], each["source"]) for each in sets] == [("public", "store")]


async def test_memory_is_still_the_administrators(served: Served) -> None:
    response = await served.client.post("/adapters/legal/load", headers=ADMIN)
    assert response.status_code == 200


async def test_a_source_that_was_away_at_the_start_is_shown(
    serve: Serve, own: AdapterStore, copy: AdapterStore
) -> None:
    shutil.rmtree(own.root)
    assert copy.mirror is not None
    copy.mirror.copy()
    served = await serve(adapters=copy)
    ready = await served.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["store_problem"].startswith(f"{ADDRESS}/channels.json cannot be read")
    assert (await served.generate(task="medical")).status_code == 200
    assert "crma_store_problems 1.0" in await served.metrics()
