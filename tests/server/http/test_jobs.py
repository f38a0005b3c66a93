"""Background ablations and named question sets: what is kept, read back, and refused."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import api_keys
import httpx
import pytest
import tiny
from api import BASE, Serve, Served

from crma.store.adapter_store import AdapterStore
from server.engine.request import Request

BODY: dict[str, Any] = {
    "question_set": "public",
    "tasks": ["medical"],
    "variants": ["task+crma", "task"],
}
ADMIN = {"Authorization": "Bearer admin"}
LINE = {"id": "q1", "task": "medical", "question": "Which?", "answers": ["one two"]}


async def start(served: Served, **body: Any) -> str:
    response = await served.client.post("/ablation", json={**BODY, "background": True, **body})
    assert response.status_code == 202, response.text
    started = response.json()
    assert started["status_url"] == f"/ablation/{started['id']}"
    return started["status_url"]


async def events(served: Served, url: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a job's events to their end, which is when the job has ended."""
    text = (await served.client.get(f"{url}/events")).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def record(served: Served, url: str) -> dict[str, Any]:
    return (await served.client.get(url)).json()


def error_of(response: httpx.Response) -> tuple[int, str]:
    """Return the status and code of a refusal."""
    return response.status_code, response.json()["error"]["code"]


def same(body: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an answer that a second run must give as well."""
    return {name: value for name, value in body.items() if name not in ("id", "wall_s")}


async def test_a_job_reports_progress_gives_the_direct_answer_and_survives_a_restart(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path)
    direct = (await served.client.post("/ablation", json=BODY)).json()
    url = await start(served)
    *progress, end = await events(served, url)
    assert end == ("done", {"status": "done"})
    assert progress[-1] == ("progress", {"done": 6, "total": 6})
    assert progress[0][1]["total"] == 6
    counts = [data["done"] for _, data in progress]
    assert counts == sorted(counts)
    found = await record(served, url)
    assert (found["status"], found["error"]) == ("done", None)
    assert same(found["result"]) == same(direct)
    assert f"/ablation/{found['result']['id']}" == url
    again = await serve(evaluations=tmp_path)
    assert await record(again, url) == found
    assert (await again.client.delete(url)).json()["status"] == "done"


async def test_a_stopped_servers_job_goes_on_and_gives_the_answer_of_an_undisturbed_one(
    serve: Serve, tmp_path: Path
) -> None:
    """It was recorded as interrupted, and what it had computed was lost."""
    served = await serve(evaluations=tmp_path, max_ablation_inflight=1)
    direct = (await served.client.post("/ablation", json=BODY)).json()
    stop = asyncio.Event()
    asked: list[str] = []

    def answer(request: Request) -> str:
        asked.append(request.id)
        if len(asked) == 3:
            stop.set()
        return "one two"

    served.engine.answer = answer
    url = await start(served)
    await stop.wait()
    await served.stop()
    assert served.engine.running == 0
    again = await serve(evaluations=tmp_path, max_ablation_inflight=1)
    assert (await events(again, url))[-1] == ("done", {"status": "done"})
    found = await record(again, url)
    assert same(found["result"]) == same(direct)
    num_again = len(again.engine.requests) - 1  # without the warm-up
    assert 6 - len(asked) <= num_again < 6


async def test_a_job_keeps_its_adapters_when_others_serve_before_it_goes_on(
    serve: Serve, root: Path, tmp_path: Path
) -> None:
    store = AdapterStore(shutil.copytree(root, tmp_path / "store"))
    served = await serve(store=store.root, max_ablation_inflight=1)
    direct = (await served.client.post("/ablation", json=BODY)).json()
    begun = asyncio.Event()

    def answer(request: Request) -> str:
        begun.set()
        return "one two"

    served.engine.answer = answer
    url = await start(served)
    await begun.wait()
    await served.stop()
    backbone = tiny.publish_backbone(store, BASE, 5, serve=False)
    task = tiny.publish(store, BASE, "medical", 7, backbone=backbone.digest, serve=False)
    store.set_serving({"backbone": backbone.version, "tasks/medical": task.version})
    again = await serve(store=store.root)
    assert (await events(again, url))[-1] == ("done", {"status": "done"})
    assert same((await record(again, url))["result"]) == same(direct)


async def test_a_job_can_be_cancelled(serve: Serve, tmp_path: Path) -> None:
    served = await serve(evaluations=tmp_path)
    questions = [{**LINE, "id": str(i)} for i in range(300)]
    url = await start(served, question_set=None, tasks=None, questions=questions)
    assert (await served.client.delete(url)).json()["status"] == "cancelled"
    assert served.engine.running == 0
    found = await record(served, url)
    assert (found["status"], found["result"]) == ("cancelled", None)
    assert found["progress"]["done"] < 600
    assert (await events(served, url))[-1] == ("done", {"status": "cancelled"})


async def test_jobs_over_the_limit_wait_and_are_listed(serve: Serve, tmp_path: Path) -> None:
    served = await serve(evaluations=tmp_path, max_ablation_jobs=1, max_ablation_queue=1)
    questions = [{**LINE, "id": str(i)} for i in range(300)]
    body = {"question_set": None, "tasks": None, "questions": questions}
    first = await start(served, **body)
    async with asyncio.timeout(30):
        while (await record(served, first))["status"] == "queued":
            await asyncio.sleep(0)
    second = await start(served, **body)
    refused = await served.client.post("/ablation", json={**BODY, "background": True})
    assert error_of(refused) == (429, "too_many_jobs")
    listed = (await served.client.get("/ablation")).json()
    assert [f"/ablation/{job['id']}" for job in listed] == [second, first]
    assert [job["status"] for job in listed] == ["queued", "running"]
    assert "request" not in listed[0]
    assert listed[0]["settings"] == {"variants": BODY["variants"]}
    await served.client.delete(first)
    assert (await events(served, second))[-1] == ("done", {"status": "done"})


async def test_records_that_cannot_be_written_are_told_and_everything_else_goes_on(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each refusal was a traceback in the log, of fifty lines."""
    (tmp_path / "file").write_text("in the way")
    served = await serve(evaluations=tmp_path / "file")
    refused = await served.client.post("/ablation", json={**BODY, "background": True})
    assert error_of(refused) == (507, "records_not_writable")
    assert (await served.client.post("/ablation", json=BODY)).status_code == 200
    assert (await served.client.get("/question_sets")).status_code == 200
    gone = await serve(database_url=f"postgresql:///crma?host={tmp_path}")
    refused = await gone.client.post("/ablation", json={**BODY, "background": True})
    assert error_of(refused) == (503, "records_unavailable")
    assert refused.headers["Retry-After"] == "5"
    assert (await gone.generate()).status_code == 200
    logged = [each for each in caplog.records if each.message.startswith("Records")]
    assert [each.message.partition(":")[0] for each in logged] == [
        "RecordsNotWritable",
        "RecordsUnavailable",
    ]
    assert not any(each.exc_info for each in caplog.records)


@pytest.fixture
async def writable(serve: Serve, root: Path, tmp_path: Path) -> tuple[Served, AdapterStore]:
    """An app on a store of its own."""
    store = AdapterStore(shutil.copytree(root, tmp_path / "store"))
    return await serve(store=store.root), store


async def publish_second_version(served: Served, store: AdapterStore) -> None:
    """Publish a second backbone and a second version of "medical" that was trained under it."""
    backbone = tiny.publish_backbone(store, BASE, 5, serve=False)
    task = tiny.publish(store, BASE, "medical", 7, backbone=backbone.digest, serve=False)
    store.set_serving({"backbone": backbone.version, "tasks/medical": task.version})
    await served.app.state.frontend.registry.refresh()


async def test_the_request_of_a_record_sent_again_gives_the_same_result(
    writable: tuple[Served, AdapterStore],
) -> None:
    served, _ = writable
    url = await start(served, seed=3)
    await events(served, url)
    found = await record(served, url)
    again = await start(served, **found["request"])
    await events(served, again)
    assert same((await record(served, again))["result"]) == same(found["result"])


async def test_the_request_of_a_record_is_refused_once_other_adapters_would_answer(
    writable: tuple[Served, AdapterStore],
) -> None:
    served, store = writable
    url = await start(served, seed=3)
    await events(served, url)
    found = await record(served, url)
    await publish_second_version(served, store)
    refused = await served.client.post("/ablation", json=found["request"])
    assert error_of(refused) == (409, "digest_mismatch")
    assert refused.json()["error"]["value"] == ["tasks", "crma"]


async def test_variants_may_name_versions_that_no_longer_serve(
    writable: tuple[Served, AdapterStore],
) -> None:
    served, store = writable
    before = (await served.client.post("/ablation", json=BODY)).json()["provenance"]
    await publish_second_version(served, store)
    variants = ["task@v1+crma@v1", "task@v1", "task@v2+crma", "task+crma@v2"]
    answer = await served.client.post("/ablation", json={**BODY, "variants": variants})
    body = answer.json()
    assert list(body["variants"]) == variants
    used = body["provenance"]
    assert used["tasks"]["medical@v1"] == before["tasks"]["medical"]
    assert used["crma@v1"] == before["crma"]
    assert used["tasks"]["medical@v2"] == used["tasks"]["medical"]
    assert used["crma@v2"] == used["crma"] != before["crma"]
    foreign = await served.client.post("/ablation", json={**BODY, "variants": ["task@v1+crma@v2"]})
    assert error_of(foreign) == (409, "lineage_mismatch")


async def test_a_server_without_jobs_says_so_instead_of_asking_to_try_again(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path, max_ablation_jobs=0)
    refused = await served.client.post("/ablation", json={**BODY, "background": True})
    assert error_of(refused) == (422, "invalid_field")
    assert "Retry-After" not in refused.headers


async def test_kept_jobs_are_limited_and_only_the_servers_ids_are_known(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path, max_ablation_kept=1)
    first, second = [await start(served) for _ in range(2)]
    await events(served, first)
    await events(served, second)
    third = await start(served)
    await events(served, third)
    assert [(await served.client.get(url)).status_code for url in (first, second, third)] == [
        404,
        404,
        200,
    ]
    for id in ("abl-0", "..%2F..%2Fchannels", "other"):
        for method in ("GET", "DELETE"):
            unknown = await served.client.request(method, f"/ablation/{id}")
            assert unknown.status_code == 404


async def test_an_uploaded_set_is_listed_and_asked_and_a_bad_one_is_refused_with_its_line(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path, admin_key="admin", max_question_set_mib=1)
    lines = "\n".join(json.dumps({**LINE, "id": str(i)}) for i in range(2))

    async def put(name: str, content: str | bytes, **headers: str) -> tuple[int, Any]:
        answer = await served.client.put(f"/question_sets/{name}", content=content, headers=headers)
        return answer.status_code, answer.json().get("error", answer.json())

    assert (await put("mine", lines))[0] == 401
    status, described = await put("mine", lines, **ADMIN)
    assert (status, described["name"], described["items"]) == (200, "mine", 2)
    status, error = await put("mine", f'{lines}\n{{"id": "3", "task": "medical"}}', **ADMIN)
    assert (status, error["field"]) == (422, "mine line 3.question")
    assert (await put("mine", b"\xff", **ADMIN))[1]["code"] == "malformed_body"
    assert (await put("mine", " " * 2**20 + "\n", **ADMIN))[1]["code"] == "body_too_large"
    for name in ("public", "A", ".x", "x" * 65):
        assert (await put(name, lines, **ADMIN))[1]["field"] == "name"
    assert (await put("..%2Fmine", lines, **ADMIN))[0] == 404
    listed = (await served.client.get("/question_sets")).json()
    assert [(each["name"], each["items"]) for each in listed] == [("mine", 2), ("public", 6)]
    asked = {"question_set": "mine", "variants": ["task"]}
    body = (await served.client.post("/ablation", json=asked)).json()
    assert {**body["question_set"], "source": "shared"} == described
    assert body["variants"]["task"]["correct"] == 2


async def test_a_set_is_read_back_as_it_was_uploaded(serve: Serve, tmp_path: Path) -> None:
    served = await serve(evaluations=tmp_path, admin_key="admin")
    lines = [{**LINE, "id": str(i), "question": f"Wäre {i}?"} for i in range(1200)]
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    await served.client.put("/question_sets/mine", content=content, headers=ADMIN)
    answer = await served.client.get("/question_sets/mine")
    assert answer.headers["Content-Type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in answer.text.splitlines()] == lines
    unknown = await served.client.get("/question_sets/other")
    assert error_of(unknown) == (404, "not_found")


async def test_a_set_shows_a_key_the_questions_of_its_tasks_only(
    serve: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    narrow = api_keys.add(file, "narrow", "ablate", tasks=["medical"])
    served = await serve(evaluations=tmp_path, keys_file=file)
    answer = await served.client.get("/question_sets/public", headers=narrow)
    tasks = {json.loads(line)["task"] for line in answer.text.splitlines()}
    assert tasks == {"medical"}


@pytest.mark.parametrize("route", ["/ablation/x", "/ablation/x/events", "/question_sets"])
async def test_reading_needs_a_key_if_keys_are_set(serve: Serve, route: str) -> None:
    served = await serve(api_keys=("key",))
    assert (await served.client.get(route)).status_code == 401
