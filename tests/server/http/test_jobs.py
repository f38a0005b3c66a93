"""Ablations in the background and question sets by name: what is kept, what comes back, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from api import BASE, Serve, Served

from crma.store.adapter_store import AdapterStore

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
    assert response.json()["status_url"] == f"/ablation/{response.json()['id']}"
    return response.json()["status_url"]


async def events(served: Served, url: str) -> list[tuple[str, dict[str, Any]]]:
    text = (await served.client.get(f"{url}/events")).text
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in parts
    ]


async def record(served: Served, url: str) -> dict[str, Any]:
    return (await served.client.get(url)).json()


def same(body: dict[str, Any]) -> dict[str, Any]:
    """What a second run has to give as well."""
    return {name: value for name, value in body.items() if name not in ("id", "wall_s")}


async def test_a_job_reports_its_progress_gives_the_direct_answer_and_survives_a_restart(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path)
    direct = (await served.client.post("/ablation", json=BODY)).json()
    url = await start(served)
    moved = await events(served, url)
    assert (moved[0][1]["total"], moved[-2:]) == (
        6,
        [("progress", {"done": 6, "total": 6}), ("done", {"status": "done"})],
    )
    assert [data["done"] for _, data in moved[:-1]] == sorted(
        data["done"] for _, data in moved[:-1]
    )
    found = await record(served, url)
    assert (found["status"], found["error"], same(found["result"])) == ("done", None, same(direct))
    assert f"/ablation/{found['result']['id']}" == url
    again = await serve(evaluations=tmp_path)
    assert await record(again, url) == found
    assert (await again.client.delete(url)).json()["status"] == "done"


async def test_a_job_can_be_cancelled_and_one_that_the_server_left_is_interrupted(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path)
    questions = [{**LINE, "id": str(i)} for i in range(300)]
    cancelled, left, killed = [
        await start(served, question_set=None, tasks=None, questions=questions) for _ in "abc"
    ]
    assert (await served.client.delete(cancelled)).json()["status"] == "cancelled"
    snapshot = (tmp_path / "ablations" / f"{killed.rpartition('/')[2]}.json").read_bytes()
    await served.app.state.ablations.jobs.stop()
    assert served.engine.running == 0
    for url, status in ((cancelled, "cancelled"), (left, "interrupted")):
        found = await record(served, url)
        assert (found["status"], found["result"]) == (status, None)
        assert found["progress"]["done"] < 600
    (tmp_path / "ablations" / f"{killed.rpartition('/')[2]}.json").write_bytes(
        snapshot
    )  # as kill -9 leaves it
    (tmp_path / "ablations" / "other.json").write_text("{}")
    again = await serve(evaluations=tmp_path)
    assert [(await record(again, url))["status"] for url in (cancelled, killed)] == [
        "cancelled",
        "interrupted",
    ]
    assert (await events(again, killed))[-1] == ("done", {"status": "interrupted"})


async def test_a_records_request_gives_the_same_again_or_names_what_is_no_longer_the_same(
    serve: Serve, root: Path, tmp_path: Path
) -> None:
    store = AdapterStore(shutil.copytree(root, tmp_path / "store"))
    served = await serve(evaluations=tmp_path / "kept", store=store.root)
    url = await start(served, seed=3)
    await events(served, url)
    found = await record(served, url)
    again = await start(served, **found["request"])
    await events(served, again)
    assert same((await record(served, again))["result"]) == same(found["result"])
    tiny.publish(store, BASE, "medical", 7, backbone=tiny.publish_backbone(store, BASE, 5).digest)
    await served.app.state.frontend.registry.refresh()
    refused = await served.client.post("/ablation", json=found["request"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "digest_mismatch")
    assert refused.json()["error"]["value"] == ["tasks", "crma"]
    versions = {**BODY, "variants": ["task@v1+crma@v1", "task@v1", "task@v2+crma", "task+crma@v2"]}
    body = (await served.client.post("/ablation", json=versions)).json()
    used, before = body["provenance"], found["result"]["provenance"]
    assert (used["tasks"]["medical@v1"], used["crma@v1"]) == (
        before["tasks"]["medical"],
        before["crma"],
    )
    assert (used["tasks"]["medical@v2"], used["crma"]) == (
        used["tasks"]["medical"],
        used["crma@v2"],
    )
    assert used["crma"] != before["crma"]
    assert list(body["variants"]) == versions["variants"]
    foreign = await served.client.post("/ablation", json={**BODY, "variants": ["task@v1+crma@v2"]})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (409, "lineage_mismatch")


async def test_jobs_are_bounded_and_only_the_servers_own_ids_are_known(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path, max_ablation_jobs=1, max_ablation_kept=1)
    first = await start(served)
    refused = await served.client.post("/ablation", json={**BODY, "background": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_jobs")
    await events(served, first)
    await events(served, second := await start(served))
    assert [(await served.client.get(url)).status_code for url in (first, second)] == [404, 200]
    assert [path.stem for path in (tmp_path / "ablations").glob("abl-*.json")] == [
        second.rpartition("/")[2]
    ]
    for id in ("abl-0", "..%2F..%2Fchannels", "other"):
        for method in ("GET", "DELETE"):
            assert (await served.client.request(method, f"/ablation/{id}")).status_code == 404


async def test_an_uploaded_set_is_listed_and_asked_and_a_bad_one_refused_by_its_line(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(evaluations=tmp_path, admin_key="admin")
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
    body = (
        await served.client.post("/ablation", json={"question_set": "mine", "variants": ["task"]})
    ).json()
    assert (body["question_set"], body["variants"]["task"]["correct"]) == (described, 2)


@pytest.mark.parametrize("route", ["/ablation/x", "/ablation/x/events", "/question_sets"])
async def test_reading_needs_a_key_where_keys_are_set(serve: Serve, route: str) -> None:
    served = await serve(api_keys=("key",))
    assert (await served.client.get(route)).status_code == 401
