"""server.http.body: what every body is checked for before anything else."""

import json
from typing import Any

import pytest
from api import JSON, Served, refused

BROKEN = "a\ud800b"
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": "base", "messages": MESSAGES}
RESPONSE: dict[str, Any] = {"model": "base", "input": "Hi"}
# A route, a body, and the name of the field that has half a surrogate pair.
BROKEN_TEXTS: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {"prompt": BROKEN}, "prompt"),
    ("/generate", {"prompt": "Hi", "stop": ["é", BROKEN]}, "stop.1"),
    ("/v1/completions", {"model": "base", "prompt": BROKEN}, "prompt"),
    ("/v1/completions", {"model": "base", "prompt": ["Hi", BROKEN]}, "prompt.1"),
    (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": BROKEN}]},
        "messages.0.content",
    ),
    (
        "/v1/chat/completions",
        {
            "model": "base",
            "messages": [{"role": "user", "content": [{"type": "text", "text": BROKEN}]}],
        },
        "messages.0.content.0.text",
    ),
    ("/v1/chat/completions", CHAT | {"metadata": {"x": "\ud800"}}, "metadata.x"),
    ("/v1/chat/completions", CHAT | {"metadata": {"\ud800": "x"}}, "metadata.\\ud800"),
    (
        "/v1/chat/completions",
        CHAT | {"chat_template_kwargs": {"x": [[BROKEN]]}},
        "chat_template_kwargs.x.0.0",
    ),
    ("/v1/chat/completions", CHAT | {"user": BROKEN}, "user"),
    ("/v1/responses", RESPONSE | {"input": BROKEN}, "input"),
    ("/v1/responses", RESPONSE | {"instructions": BROKEN}, "instructions"),
    ("/v1/responses", RESPONSE | {"metadata": {"x": BROKEN}}, "metadata.x"),
    ("/tokenize", {"prompt": BROKEN}, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": BROKEN}]}, "messages.0.content"),
]


@pytest.mark.parametrize(("path", "body", "field"), BROKEN_TEXTS)
async def test_half_a_surrogate_pair_is_refused_with_the_name_of_its_field(
    served: Served, path: str, body: dict[str, Any], field: str
) -> None:
    """Most of them were a 500."""
    error = await refused(served, 422, "invalid_field", path=path, content=json.dumps(body))
    assert error["param" if path.startswith("/v1/") else "field"] == field
    assert error["message"].startswith(field)


async def test_whole_surrogate_pairs_and_other_characters_are_texts(served: Served) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "é🙂"}], "user": "é🙂"}
    content = json.dumps(body)
    response = await served.client.post("/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 200, response.text


async def test_an_ignored_field_may_be_of_any_depth_as_it_is_not_read(served: Served) -> None:
    """Its values were validated one by one, for most of a second while nobody was answered."""
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    response = await served.client.post("/v1/chat/completions", json=CHAT | {"metadata": deep})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"),
        ("/tokenize", "messages"),
        ("/v1/responses", "input"),
    ],
)
async def test_more_messages_than_openai_takes_are_refused_by_name(
    served: Served, path: str, field: str
) -> None:
    body = {"model": "base", field: MESSAGES * 2049}
    error = await refused(served, 422, "invalid_field", path=path, json=body)
    assert error["param" if path.startswith("/v1/") else "field"] == field
    assert "2048" in error["message"]
