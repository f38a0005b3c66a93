"""Each way to send something wrong: its status, its code, the field it names; and that the next good request works."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.request import PromptTooLong
from server.errors import ApiError, error_response

from .conftest import Serve, Served

KEYS = ["code", "message", "field", "value", "allowed"]
JSON = {"content-type": "application/json"}


async def refused(served: Served, status: int, code: str, **request: Any) -> dict[str, Any]:
    """The error of a request that must be refused, after which a good one must work."""
    response = await served.client.post(request.pop("path", "/generate"), **{"headers": JSON, **request})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == KEYS
    assert error["code"] == code
    assert (await served.generate()).status_code == 200
    return error


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "\xff"}',
        '{"prompt": "Hi"}'.encode("utf-16"),
        b"{",
        b"",
        b"[" * 3000,
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
async def test_a_body_that_is_not_json_in_utf8(served: Served, content: bytes) -> None:
    await refused(served, 400, "malformed_body", content=content)


async def test_a_body_under_another_content_type(served: Served) -> None:
    headers = {"content-type": "text/plain"}
    error = await refused(served, 400, "malformed_body", content=b'{"prompt": "Hi"}', headers=headers)
    assert "application/json" in error["allowed"]


async def test_a_body_over_the_limit_declared_or_not(serve: Serve) -> None:
    served = await serve(max_body_bytes=1024)
    content = json.dumps({"prompt": "x" * 1100}).encode()
    declared = await refused(served, 413, "body_too_large", content=content)
    assert (declared["field"], declared["value"]) == ("body", len(content))
    taken = 0

    async def long() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(100):
            taken += 512
            yield b"x" * 512

    await refused(served, 413, "body_too_large", content=long())
    assert taken <= 2048
    exactly = json.dumps({"prompt": "x" * 80}).encode().ljust(1024)
    assert (await served.client.post("/generate", content=exactly, headers=JSON)).status_code == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["Hi"]}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": 1}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"crma": 1}, "crma"),
        ({"crma": "true"}, "crma"),
        ({"stream": "yes"}, "stream"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"task": 5}, "task"),
    ],
)
async def test_a_field_that_cannot_be_honoured_is_named(served: Served, change: dict[str, Any], field: str) -> None:
    error = await refused(served, 422, "invalid_field", json={"prompt": "Hi", **change})
    assert error["field"] == field
    assert error["message"].startswith(field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_a_number_that_json_does_not_have(served: Served, number: str) -> None:
    content = f'{{"prompt": "Hi", "temperature": {number}}}'
    error = await refused(served, 422, "invalid_field", content=content)
    assert error["field"] == "temperature"


async def test_half_a_character_is_refused_and_can_be_reported(served: Served) -> None:
    error = await refused(served, 422, "invalid_field", content=b'{"prompt": "\\ud800"}')
    assert error["field"] == "prompt"
    unknown = await refused(served, 422, "unknown_field", content=b'{"prompt": "Hi", "\\ud800": 1}')
    assert "ud800" in unknown["field"]


async def test_an_unknown_field_is_named_with_what_there_is(served: Served) -> None:
    error = await refused(served, 422, "unknown_field", json={"prompt": "Hi", "temprature": 1})
    assert (error["field"], error["value"]) == ("temprature", 1)
    assert "temperature" in error["allowed"]


async def test_what_is_repeated_of_a_bad_value_is_short(served: Served) -> None:
    response = await served.generate(task="x" * 100_000)
    assert response.status_code == 404
    assert len(response.content) < 2000


async def test_a_prompt_over_the_context(served: Served) -> None:
    served.engine.refusal = PromptTooLong(500, 16, 128)
    response = await served.generate()
    served.engine.refusal = None
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["field"], error["value"]) == (
        422,
        "prompt_too_long",
        "prompt",
        500,
    )
    assert "128" in error["allowed"]


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"task": "medcal"}, 404, "not_found", "task"),
        ({"task": "base"}, 404, "not_found", "task"),
        ({"task": "medical@v9"}, 404, "not_found", "task"),
        ({"task": "medical@"}, 404, "not_found", "task"),
        ({"task": "../../etc"}, 404, "not_found", "task"),
        ({"task": "legal", "crma": True}, 409, "lineage_mismatch", "crma"),
    ],
)
async def test_adapters_that_cannot_be_had(
    served: Served, body: dict[str, Any], status: int, code: str, field: str
) -> None:
    error = await refused(served, status, code, json={"prompt": "Hi", **body})
    assert error["field"] == field
    assert error["allowed"]


async def test_without_a_backbone_the_answer_says_how_to_go_on(serve: Serve) -> None:
    served = await serve(load_backbone=False)
    error = await refused(served, 409, "no_backbone", json={"prompt": "Hi", "task": "medical"})
    assert (error["field"], error["allowed"]) == ("crma", False)
    assert (await served.generate(task="medical", crma=False)).status_code == 200


async def test_a_route_or_method_that_is_not_there(served: Served) -> None:
    await refused(served, 404, "no_route", path="/nowhere")
    response = await served.client.get("/generate")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"


def test_openai_routes_have_openais_shape() -> None:
    error = ApiError("no", field="model", value="x", status=404, code="not_found")
    body = json.loads(error_response(error, "/v1/completions").body)
    assert body == {"error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "not_found"}}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=JSON_VALUES, field=st.sampled_from(["prompt", "stop", "temperature", "seed", "task", "crma", "other"]))
def test_no_json_makes_the_server_fail(everything: Any, value: Any, field: str) -> None:
    status = everything(json.dumps({"prompt": "Hi", field: value}))
    assert status in (200, 404, 409, 422)


@pytest.fixture
async def everything(served: Served) -> Any:
    """Posts a body to the app from a synchronous test, in the app's own loop."""
    import asyncio

    loop = asyncio.get_running_loop()

    def post(content: str) -> int:
        response = loop.run_until_complete(served.client.post("/generate", content=content, headers=JSON))
        return response.status_code

    return post
