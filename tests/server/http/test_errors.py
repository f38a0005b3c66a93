"""Bad requests: each gets its status, its code and the field at fault, and the next good one works.

`api.refused` checks all of that, whatever the request.
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

NOT_JSON = [
    b'{"prompt": "\xff"}',
    '{"prompt": "Hi"}'.encode("utf-16"),
    b'{"prompt": "Hi"} \xc3',
    b"{",
    b"",
    b"[" * 3000,
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
]
# Values that a field refuses, by the name in the error: "stop.0" is the first of the stop strings.
INVALID: dict[str, list[Any]] = {
    "prompt": ["", None, ["Hi"], "\ud800"],
    "temperature": [-1, 2.1, True, "0", math.nan, math.inf, -math.inf],
    "max_tokens": [0, "5", 5.5, True],
    "top_p": [0],
    "top_k": [-2],
    "min_tokens": [-1, 17],
    "stop_token_ids": [5, [5] * 1025],
    "stop_token_ids.1": [[5, 300], [5, -1], [5, "a"]],
    "logit_bias": [[], {"a": 1}, {"-1": 1}, {"9" * 5000: 1}],
    "logit_bias.5": [{"5": 101}, {"5": "1"}],
    "logit_bias.300": [{"300": 1}],
    "skip_special_tokens": [0],
    "include_stop_str_in_output": ["yes"],
    "seed": [-1, 2**53],
    "n": [0, 9],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, 2.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "top_logprobs": [-1, 21, 1],
    "prompt_logprobs": [1],
    "stop": [1, list("abcde")],
    "stop.0": [""],
    "stop.1": [["a", 1]],
    "crma": [1, "true"],
    "stream": ["yes"],
    "timeout_s": [0],
    "task": [5],
}
UNKNOWN_TASKS = ["medcal", "base", "medical@v9", "medical@", "../../etc", "x" * 100_000]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = ["prompt", "stop", "temperature", "seed", "task", "crma", "other"]


@pytest.mark.parametrize("content", NOT_JSON)
async def test_a_body_that_is_not_json_in_utf8_is_malformed(served: Served, content: bytes) -> None:
    await refused(served, 400, "malformed_body", content=content)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded; charset=x"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_body_of_another_content_type_is_told_which_header_to_set(
    served: Served, kind: str, path: str
) -> None:
    """`curl -d` sends the second; the answer was "not JSON", although the body was JSON."""
    body = {"content": b'{"prompt": "Hi"}', "headers": {"content-type": kind}}
    error = await refused(served, 400, "malformed_body", path=path, **body)
    assert "set the header Content-Type: application/json" in error["message"]
    assert kind.partition(";")[0] in error["message"]


async def test_a_body_without_a_content_type_is_refused(served: Served) -> None:
    """A page of any other origin could send one without asking, with `fetch(…, {mode: "no-cors",
    body: new Blob(…)})`."""
    body = {"content": b'{"prompt": "Hi"}', "headers": {}}
    error = await refused(served, 400, "malformed_body", **body)
    assert "set the header Content-Type: application/json" in error["message"]


async def test_a_body_may_come_in_pieces_and_is_read_no_further_than_its_limit(
    serve: Serve,
) -> None:
    served = await serve(max_body_bytes=1024)
    num_sent = 0

    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        nonlocal num_sent
        for start in range(0, len(body), 11):
            num_sent += 11
            yield body[start : start + 11]

    error = await refused(served, 413, "body_too_large", content=pieces(b"x" * 100_000))
    assert error["field"] == "body"
    assert 1024 < error["value"] <= num_sent < 1100
    largest = json.dumps({"prompt": "é🙂" * 20}, ensure_ascii=False).encode().ljust(1024)
    response = await served.client.post("/generate", content=pieces(largest), headers=JSON)
    assert response.status_code == 200
    await refused(served, 413, "body_too_large", content=largest + b" ")


async def test_a_client_that_leaves_while_sending_gets_no_error_about_its_body(
    served: Served,
) -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status") in (None, ClientGone.status)

    await served.app(SCOPE, receive, send)


@pytest.mark.parametrize("field", INVALID)
async def test_an_invalid_value_is_refused_with_the_name_of_its_field(
    served: Served, field: str
) -> None:
    for value in INVALID[field]:
        content = json.dumps({"prompt": "Hi", field.partition(".")[0]: value})
        error = await refused(served, 422, "invalid_field", content=content)
        assert error["field"] == field
        assert error["message"].startswith(field)
        assert error["allowed"] is not None


@pytest.mark.parametrize(
    ("unknown", "shown", "value"), [("temprature", "temprature", 1), ("\ud800", "\\ud800", None)]
)
async def test_an_unknown_field_is_named_and_the_known_ones_are_listed(
    served: Served, unknown: str, shown: str, value: int | None
) -> None:
    content = json.dumps({"prompt": "", unknown: 1})
    error = await refused(served, 422, "unknown_field", content=content)
    assert error["field"] == shown
    assert error["value"] == value
    assert "temperature" in error["allowed"]


@pytest.mark.parametrize("task", UNKNOWN_TASKS)
async def test_an_unknown_task_is_named_and_the_known_ones_are_listed_in_a_short_error(
    served: Served, task: str
) -> None:
    error = await refused(served, 404, "not_found", json={"prompt": "Hi", "task": task})
    assert error["field"] == "task"
    assert set(error["allowed"]) in ({"medical", "legal"}, {"medical@v1"})
    assert len(json.dumps(error)) < 2000


async def test_an_unknown_route_is_404_and_an_unknown_method_405(served: Served) -> None:
    await refused(served, 404, "no_route", path="/nowhere")
    response = await served.client.get("/generate")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["Allow"] == "POST"


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(value=JSON_VALUES, field=st.sampled_from(FIELDS))
async def test_no_json_value_makes_the_server_fail(served: Served, value: Any, field: str) -> None:
    content = json.dumps({"prompt": "Hi", field: value})
    response = await served.client.post("/generate", content=content, headers=JSON)
    assert response.status_code in (200, 404, 409, 422)
