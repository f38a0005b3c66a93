"""GET /usage: the tokens of every key, on both databases."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import api_keys
import pytest
from api import Serve, Served
from api_keys import Headers
from scripted_engine import FIRST_TOKEN, ScriptedEngine

from server.engine.request import FinishReason, Request
from server.http.body import EXAMPLES

WEB, LAB, ROOT = (api_keys.bearer(key) for key in ("the key of web", "the key of lab", "root"))
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


@pytest.fixture
def options(tmp_path: Path, database_url: str | None) -> dict[str, Any]:
    """Settings of a server with the keys `web` and `lab` and the admin key `root`."""
    file = tmp_path / "keys.json"
    for name in ("web", "lab"):
        api_keys.add(file, name, "generate", "ablate")
    return {"keys_file": file, "admin_key": "root", "database_url": database_url}


@pytest.fixture
async def served(serve: Serve, options: dict[str, Any]) -> Served:
    return await serve(**options)


class LongEngine(ScriptedEngine):
    """Its answers are long, but for the warm-up's."""

    def tokens(self, request: Request, index: int) -> list[tuple[int, str]]:
        num_tokens = 1 if request.id == "warm-up" else 1000
        return [(FIRST_TOKEN, "x")] * num_tokens


async def generate(served: Served, headers: Headers, **body: Any) -> dict[str, int]:
    """Ask for a text. Returns the usage that the answer names."""
    answer = await served.client.post("/generate", json={"prompt": "Hi", **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]


async def used(served: Served, headers: Headers, query: str = "") -> list[dict[str, Any]]:
    """What /usage has, once the server has written it."""
    await served.app.state.frontend.usage.flush()
    answer = await served.client.get(f"/usage{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]


def today() -> str:
    return datetime.now(UTC).date().isoformat()


async def test_usage_is_what_the_answers_said_by_key_task_and_switch(served: Served) -> None:
    first = await generate(served, WEB, task="medical", crma=True, max_tokens=3)
    second = await generate(served, WEB, task="medical", crma=True, n=2)
    await generate(served, WEB, task="medical", crma=False)
    await generate(served, LAB)
    rows = await used(served, WEB)
    assert {row["key"] for row in rows} == {"web"}
    off, on = sorted(rows, key=lambda row: row["crma"])
    assert (on["day"], on["task"], on["crma"], on["requests"]) == (today(), "medical", True, 2)
    assert on["prompt_tokens"] == first["prompt_tokens"] + second["prompt_tokens"]
    assert on["output_tokens"] == first["completion_tokens"] + second["completion_tokens"]
    assert on["cached_tokens"] == first["cached_tokens"] + second["cached_tokens"]
    assert on["task_digest"] == off["task_digest"]
    assert on["task_digest"].startswith("sha256:")
    assert (off["crma"], off["requests"]) == (False, 1)
    example = EXAMPLES["/usage"]["answers"]["application/json"]["example"]["usage"][0]
    assert list(on) == list(example)
    (base,) = await used(served, LAB)
    assert (base["task"], base["task_digest"], base["crma"]) == (None, None, False)


async def test_a_key_sees_its_own_and_an_admin_everyones(served: Served) -> None:
    for headers in (WEB, WEB, LAB):
        await generate(served, headers)
    assert [row["key"] for row in await used(served, WEB)] == ["web"]
    assert await used(served, WEB, "?key=lab") == []
    assert [row["key"] for row in await used(served, ROOT)] == ["lab", "web"]
    (total,) = await used(served, ROOT, "?key=web&by=key")
    assert list(total) == ["key", *COUNTS]
    assert total["requests"] == 2


async def test_days_tasks_and_sums(served: Served) -> None:
    await generate(served, WEB)
    await generate(served, WEB, task="legal")
    yesterday = (datetime.now(UTC) - timedelta(days=1)).date().isoformat()
    assert await used(served, WEB, f"?to={yesterday}") == []
    assert len(await used(served, WEB, f"?from={yesterday}&to={today()}")) == 2
    assert [row["task"] for row in await used(served, WEB, "?task=legal")] == ["legal"]
    assert [row["task"] for row in await used(served, WEB, "?task=base")] == [None]
    (one,) = await used(served, WEB, "?by=day&by=key")
    assert (one["day"], one["requests"]) == (today(), 2)
    answer = (await served.client.get("/usage?to=2026-03-30", headers=WEB)).json()
    assert answer == {"from": "2026-03-01", "to": "2026-03-30", "usage": []}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("from=yesterday", "from"),
        ("from=2026-02-02&to=2026-02-01", "from"),
        ("by=week", "by.0"),
        ("task=%00", "task"),
        ("key=%00", "key"),
        ("days=3", "days"),
        ("to=0001-01-01&from=0001-01-02", "from"),
    ],
)
async def test_a_wrong_query_is_refused(served: Served, query: str, field: str) -> None:
    answer = await served.client.get(f"/usage?{query}", headers=WEB)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["field"] == field
    assert (await served.client.get("/usage?to=0001-01-01", headers=WEB)).status_code == 200


async def test_more_sums_than_an_answer_holds_are_refused_and_not_cut_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.service.usage.MAX_SUMS", 1)
    await generate(served, WEB)
    await generate(served, WEB, task="legal")
    await served.app.state.frontend.usage.flush()
    answer = await served.client.get("/usage", headers=WEB)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "by")
    assert len(await used(served, WEB, "?by=key")) == 1


async def test_items_of_an_ablation_and_prompts_of_a_list_are_requests(served: Served) -> None:
    body = {"question_set": "public", "variants": ["task", "base"]}
    answer = await served.client.post("/ablation", json=body, headers=WEB)
    assert answer.status_code == 200, answer.text
    num_items = len(served.engine.requests) - 1  # the first is the warm-up
    (one,) = await used(served, WEB, "?by=key")
    assert one["requests"] == num_items > 0
    completion = {"model": "base", "prompt": ["Hi", "Ho"]}
    answer = await served.client.post("/v1/completions", json=completion, headers=LAB)
    (two,) = await used(served, LAB, "?by=key")
    assert two["requests"] == 2
    assert two["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]


async def test_a_refused_request_is_none_and_one_that_was_cut_short_is_one(
    serve: Serve, options: dict[str, Any]
) -> None:
    engine = ScriptedEngine()
    served = await serve(engine=engine, **options)
    for field, value in (("task", "nothing"), ("timeout_s", 1e-9)):
        refused = {"prompt": "Hi", field: value}
        answer = await served.client.post("/generate", json=refused, headers=WEB)
        assert answer.status_code in (404, 504)
    assert await used(served, WEB) == []
    engine.ending = (FinishReason.ABORT, "deadline")
    answer = await served.client.post("/generate", json={"prompt": "Hi"}, headers=WEB)
    assert answer.status_code == 504
    (row,) = await used(served, WEB)
    assert (row["requests"], row["output_tokens"]) == (1, 1)


async def test_what_is_counted_is_written_when_the_server_stops_and_outlives_it(
    served: Served, serve: Serve, options: dict[str, Any]
) -> None:
    await generate(served, WEB)
    assert (await served.client.get("/usage", headers=WEB)).json()["usage"] == []
    await served.stop()
    again = await serve(**options)
    (row,) = (await again.client.get("/usage", headers=WEB)).json()["usage"]
    assert row["requests"] == 1
    await generate(again, WEB)
    (row,) = await used(again, WEB)
    assert row["requests"] == 2


async def test_requests_that_the_end_of_the_server_cuts_short_are_counted(
    serve: Serve, options: dict[str, Any]
) -> None:
    engine = LongEngine()
    served = await serve(engine=engine, **options)
    running = asyncio.create_task(
        served.client.post("/generate", json={"prompt": "Hi"}, headers=WEB)
    )
    async with asyncio.timeout(10):
        while not engine.running:
            await asyncio.sleep(0)
        await engine.close()
        assert (await running).status_code == 503
    await served.stop()
    again = await serve(**options)
    (row,) = (await again.client.get("/usage", headers=WEB)).json()["usage"]
    assert row["requests"] == 1


async def test_generation_goes_on_while_usage_cannot_be_written(
    serve: Serve, options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "full").write_text("no folder can be made here")
    served = await serve(
        **{**options, "database_url": None}, evaluations=tmp_path / "full", usage_flush_s=3600
    )
    await generate(served, WEB)
    await served.app.state.frontend.usage.flush()
    assert 'crma_record_failures_total{record="usage"} 1.0' in await served.metrics()
    (tmp_path / "full").unlink()
    await generate(served, WEB)
    await served.app.state.frontend.usage.flush()
    (row,) = await used(served, WEB)
    assert row["requests"] == 2


async def test_without_keys_everyone_sees_what_everyone_used(serve: Serve) -> None:
    served = await serve()
    await generate(served, {})
    (row,) = await used(served, {})
    assert (row["key"], row["requests"]) == ("", 1)
