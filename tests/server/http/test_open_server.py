"""What a page of another origin can do with a server without keys: nothing."""

import json

import pytest
from api import Serve, Served

SIMPLE = [None, "text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded"]
"""The types that `fetch` sends to another origin without asking it first: `no-cors`."""


@pytest.mark.parametrize("kind", [*SIMPLE, "multipart/form-data; boundary=x"])
async def test_a_page_of_another_origin_starts_no_background_ablation(
    serve: Serve, kind: str | None, tmp_path: object
) -> None:
    """`fetch(url, {method: "POST", mode: "no-cors", body: new Blob([json])})` started one."""
    served: Served = await serve(evaluations=tmp_path)
    body = {"question_set": "public", "variants": ["task"], "background": True}
    headers = {"Origin": "https://evil.example"}
    if kind is not None:
        headers["Content-Type"] = kind
    answer = await served.client.post("/ablation", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["field"]) == ("malformed_body", "Content-Type")
    assert [request.id for request in served.engine.requests] == ["warm-up"]
