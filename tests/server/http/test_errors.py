"""Each way to send something wrong: its status, its code, the field it names; and that the next
good request works.
"""

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from api import JSON, SCOPE, Serve, Served, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.service.errors import ClientGone

NO_JSON = [b'{"prompt": "\xff"}', '{"prompt": "Hi"}'.encode("utf-16"), b'{"prompt": "Hi"} \xc3']
NO_JSON += [b"{", b"", b"[" * 3000, b'{"max_tokens": ' + b"9" * 5000 + b"}"]
INVALID: dict[str, list[Any]] = {
    "prompt": ["", None, ["Hi"], "\ud800"],
    "temperature": [-1, 2.1, True, "0", 1e-40],
}
INVALID["temperature"] += [math.nan, math.inf, -math.inf]
INVALID |= {
    "max_tokens": [0, "5", 5.5, True],
    "top_p": [0],
    "top_k": [-1],
    "seed": [-1, 2**53],
    "n": [0, 9],
}
INVALID |= {"min_p": [-0.1, 1.1], "repetition_penalty": [0, 2.1], "presence_penalty": [-2.1, 2.1]}
INVALID |= {"frequency_penalty": [-2.1, 2.1], "top_logprobs": [-1, 21, 1], "prompt_logprobs": [1]}
INVALID |= {"stop": [1, list("abcde")], "stop.0": [""], "stop.1": [["a", 1]], "crma": [1, "true"]}
INVALID |= {"stream": ["yes"], "timeout_s": [0], "task": [5]}


@pytest.mark.parametrize("content", NO_JSON)
async def test_a_body_that_is_not_json_in_utf8(served: Served, content: bytes) -> None:
    await refused(served, 400, "malformed_body", content=content)


async def test_a_body_under_another_content_type(served: Served) -> None:
    headers = {"content-type": "text/plain"}
    error = await refused(
        served, 400, "malformed_body", content=b'{"prompt": "Hi"}', headers=headers
    )
    assert "application/json" in error["allowed"]


async def test_a_body_comes_in_pieces_and_one_over_the_limit_is_not_read_on(serve: Serve) -> None:
    served = await serve(max_body_bytes=1024)
    taken = 0

    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        nonlocal taken
        for byte in range(0, len(body), 11):
            taken += 11
            yield body[byte : byte + 11]

    error = await refused(served, 413, "body_too_large", content=pieces(b"x" * 100_000))
    assert error["field"] == "body"
    assert 1024 < error["value"] <= taken < 1100
    exactly = json.dumps({"prompt": "é🙂" * 20}, ensure_ascii=False).encode().ljust(1024)
    assert (
        await served.client.post("/generate", content=pieces(exactly), headers=JSON)
    ).status_code == 200
    await refused(served, 413, "body_too_large", content=exactly + b" ")


async def test_a_client_that_goes_while_it_sends_is_no_malformed_body(served: Served) -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status") in (None, ClientGone.status)

    await served.app(SCOPE, receive, send)


@pytest.mark.parametrize("field", INVALID)
async def test_a_field_that_cannot_be_honoured_is_named(served: Served, field: str) -> None:
    for value in INVALID[field]:
        content = json.dumps({"prompt": "Hi", field.partition(".")[0]: value})
        error = await refused(served, 422, "invalid_field", content=content)
        assert error["field"] == field
        assert error["message"].startswith(field)
        assert error["allowed"] is not None


@pytest.mark.parametrize(
    ("unknown", "shown", "value"), [("temprature", "temprature", 1), ("\ud800", "\\ud800", None)]
)
async def test_an_unknown_field_is_named_with_what_there_is(
    served: Served, unknown: str, shown: str, value: int | None
) -> None:
    error = await refused(
        served, 422, "unknown_field", content=json.dumps({"prompt": "", unknown: 1})
    )
    assert (error["field"], error["value"], "temperature" in error["allowed"]) == (
        shown,
        value,
        True,
    )


@pytest.mark.parametrize(
    "task", ["medcal", "base", "medical@v9", "medical@", "../../etc", "x" * 100_000]
)
async def test_a_task_that_is_not_there_is_named_shortly_with_what_there_is(
    served: Served, task: str
) -> None:
    error = await refused(served, 404, "not_found", json={"prompt": "Hi", "task": task})
    assert error["field"] == "task"
    assert set(error["allowed"]) in ({"medical", "legal"}, {"medical@v1"})
    assert len(json.dumps(error)) < 2000


async def test_a_route_or_method_that_is_not_there(served: Served) -> None:
    await refused(served, 404, "no_route", path="/nowhere")
    response = await served.client.get("/generate")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(
    value=JSON_VALUES,
    field=st.sampled_from(["prompt", "stop", "temperature", "seed", "task", "crma", "other"]),
)
async def test_no_json_makes_the_server_fail(served: Served, value: Any, field: str) -> None:
    content = json.dumps({"prompt": "Hi", field: value})
    response = await served.client.post("/generate", content=content, headers=JSON)
    assert response.status_code in (200, 404, 409, 422)
