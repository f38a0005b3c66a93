"""GET /audit: every act of an administrator, on both databases, whoever asks."""

import json
from pathlib import Path
from typing import Any

import api_keys
import httpx
import pytest
from admin import ADMIN, delete, upload
from api import Serve, Served
from api_keys import Headers

from crma.store.adapter_store import AdapterStore
from server.http.body import EXAMPLES

BOSS: dict[str, Any] = {"admin_key": "root"}
LINE = b'{"id": "1", "task": "legal", "question": "Which?", "answers": ["x"]}\n'


@pytest.fixture
async def served(
    serve: Serve, own: AdapterStore, database_url: str | None, tmp_path: Path
) -> Served:
    """A server whose store and database are the test's own, with the admin key `root`."""
    file = tmp_path / "keys.json"
    api_keys.add(file, "web", "generate", "ablate")
    return await serve(store=own.root, keys_file=file, database_url=database_url, **BOSS)


WEB: Headers = api_keys.bearer("the key of web")


async def act(served: Served, method: str, path: str, headers: Headers = ADMIN, **sent: Any) -> int:
    return (await served.client.request(method, path, headers=headers, **sent)).status_code


async def acts(served: Served, query: str = "") -> list[dict[str, Any]]:
    answer = await served.client.get(f"/audit{query}", headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


def line(act: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(act[name] for name in names)


async def test_every_act_is_listed_newest_first_with_what_it_was_done_to(
    served: Served, peft: Path
) -> None:
    assert await act(served, "POST", "/adapters/legal/load") == 200
    assert await act(served, "POST", "/adapters/legal/pin") == 200
    assert await act(served, "POST", "/adapters/legal/unpin") == 200
    assert await act(served, "POST", "/adapters/legal/unload") == 200
    assert (await upload(served, peft)).status_code == 201
    body = {"lora_name": "new"}
    assert await act(served, "POST", "/v1/unload_lora_adapter", json=body) == 200
    assert (await delete(served, "new")).status_code == 200
    assert await act(served, "PUT", "/question_sets/mine", content=LINE) == 200
    listed = await acts(served, "?who=admin")
    what = ["load", "pin", "unpin", "unload", "publish", "stop", "delete", "upload question set"]
    assert [each["what"] for each in listed] == what[::-1]
    objects = ["legal"] * 4 + ["new"] * 3 + ["mine"]
    assert [each["object"] for each in listed] == objects[::-1]
    assert {line(each, "who", "result", "reason") for each in listed} == {("admin", "done", None)}
    published = next(each for each in listed if each["what"] == "publish")
    assert published["version"] == "v1"
    assert published["digest"].startswith("sha256:")
    assert listed[0]["digest"].startswith("sha256:")  # of the question set
    example = EXAMPLES["/audit"]["answers"]["application/json"]["example"][0]
    assert list(listed[0]) == list(example)


async def test_refused_acts_are_listed_with_code_and_reason_and_the_id_of_their_request(
    served: Served,
) -> None:
    headers = {**ADMIN, "X-Request-Id": "mine"}
    assert await act(served, "POST", "/adapters/nothing/load", headers) == 404
    assert await act(served, "POST", "/adapters/legal/unload?when_in_use=never") == 422
    assert await act(served, "PUT", "/question_sets/mine", content=b"{}") == 422
    assert await act(served, "POST", "/v1/load_lora_adapter", json={}) == 422
    lora, question_set, unload, load = await acts(served)
    assert line(load, "object", "result", "request_id") == ("nothing", "not_found", "mine")
    assert "no task 'nothing'" in load["reason"]
    assert line(unload, "object", "result") == ("legal", "invalid_field")
    assert "when_in_use" in unload["reason"]
    assert line(question_set, "what", "object") == ("upload question set", "mine")
    assert question_set["result"] != "done"
    assert line(lora, "what", "result") == ("publish", "invalid_field")


async def test_what_a_key_tries_that_is_not_for_admin_is_listed_and_what_nobody_tries_is_not(
    served: Served,
) -> None:
    assert await act(served, "DELETE", "/adapters/legal", WEB) == 403
    assert await act(served, "DELETE", "/adapters/legal", {}) == 401
    assert await act(served, "DELETE", "/adapters/legal", api_keys.bearer("guess")) == 401
    (only,) = await acts(served)
    assert line(only, "who", "what", "object", "result") == (
        "web",
        "delete",
        "legal",
        "forbidden",
    )


async def test_an_admins_cancelling_of_anothers_job_is_listed(served: Served) -> None:
    body = {"question_set": "public", "variants": ["task"], "background": True}
    answer = await served.client.post("/ablation", json=body, headers=WEB)
    job = answer.json()["id"]
    assert await act(served, "DELETE", f"/ablation/{job}") == 200
    assert await act(served, "DELETE", "/ablation/another") == 404
    refused, done = await acts(served, "?what=cancel+ablation")
    assert line(done, "who", "object", "result") == ("admin", job, "done")
    assert line(refused, "object", "result") == ("another", "not_found")


async def test_pages_and_filters(served: Served) -> None:
    for path in ("/adapters/legal/pin", "/adapters/medical/pin", "/adapters/legal/unpin"):
        await act(served, "POST", path)
    await act(served, "POST", "/adapters/legal/pin", WEB)
    seen: list[dict[str, Any]] = []
    while page := await acts(served, f"?limit=3&before={seen[-1]['id'] if seen else 2**62}"):
        seen += page
    assert [each["what"] for each in seen] == ["pin", "unpin", "pin", "pin"]
    assert seen == await acts(served)
    assert [each["who"] for each in await acts(served, "?who=web")] == ["web"]
    assert [each["object"] for each in await acts(served, "?what=unpin")] == ["legal"]
    assert await acts(served, "?who=nobody") == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "before=0", f"before={2**63}", "who=%00", "until=1"]
)
async def test_a_wrong_query_is_refused(served: Served, query: str) -> None:
    answer = await served.client.get(f"/audit?{query}", headers=ADMIN)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == query.split("=")[0]


async def test_acts_outlive_the_server_and_another_server_lists_them(
    served: Served, serve: Serve, database_url: str | None, own: AdapterStore
) -> None:
    await act(served, "POST", "/adapters/legal/pin")
    before = await acts(served)
    await served.stop()
    again = await serve(store=own.root, database_url=database_url, **BOSS)
    assert await acts(again) == before


async def test_what_commands_change_in_the_store_is_listed_once_the_server_sees_it(
    served: Served, own: AdapterStore
) -> None:
    """`crma store promote`, `rollback` and `import` need no server, and no key."""
    frontend = served.app.state.frontend
    assert await acts(served) == []  # what was there at the start is in the store's history
    own.set_serving(dict.fromkeys(("tasks/legal", "tasks/medical", "backbone")))
    await frontend.registry.refresh()
    await frontend.audit.stop()
    own.roll_back("tasks/legal")
    await frontend.registry.refresh()
    await frontend.audit.stop()
    listed = [line(each, "what", "object", "version") for each in await acts(served)]
    stopped = {("stop", name, None) for name in ("legal", "medical", "backbone")}
    assert listed[0] == ("roll back", "legal", "v1")
    assert {*listed[1:]} == stopped
    assert {each["who"] for each in await acts(served)} == {"the store"}


async def test_an_act_is_done_although_it_cannot_be_recorded(
    serve: Serve, own: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who removes a bad adapter does not depend on a database."""
    (tmp_path / "full").write_text("no folder can be made here")
    served = await serve(store=own.root, evaluations=tmp_path / "full", **BOSS)
    assert await act(served, "POST", "/adapters/legal/pin") == 200
    assert own.task("legal").digest in served.engine.resident()
    assert "'pin' by 'admin' is not in the records" in caplog.text
    metrics = await served.metrics()
    assert 'crma_record_failures_total{record="audit"} 1.0' in metrics
    assert 'crma_record_failures_total{record="audit_log"} 0.0' in metrics
    answer = await served.client.get("/audit", headers=ADMIN)
    assert (answer.status_code, answer.json()) == (200, [])


async def test_acts_have_the_tenant_of_their_key(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    headers = api_keys.add(file, "boss", "admin", tenant="acme")
    served = await serve(keys_file=file, audit_log=tmp_path / "audit.jsonl")
    await act(served, "POST", "/adapters/legal/pin", headers)
    (listed,) = (await served.client.get("/audit", headers=headers)).json()
    assert line(listed, "who", "tenant") == ("boss", "acme")
    assert json.loads((tmp_path / "audit.jsonl").read_text())["tenant"] == "acme"


async def test_acts_and_usage_are_removed_when_old_jobs_are(
    served: Served, serve: Serve, own: AdapterStore, database_url: str | None
) -> None:
    await act(served, "POST", "/adapters/legal/pin")
    kept = {"store": own.root, "database_url": database_url, **BOSS}
    for kept_s, num_left in ((3600.0, 1), (1e-6, 0)):
        again = await serve(**kept, audit_kept_s=kept_s, usage_kept_s=kept_s)
        await again.app.state.ablations.jobs.runner._look(is_cleaning=True)
        assert len(await acts(again)) == num_left


async def test_a_server_without_acts_answers_and_makes_no_database(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path / "kept", **BOSS)
    answer: httpx.Response = await served.client.get("/audit", headers=ADMIN)
    assert answer.json() == []
    assert not (tmp_path / "kept").exists()
