"""What a request may hold: it is refused by name before any work is done for it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from api import SCOPE, Serve, Served, refused

from server.http.body_limit import MAX_DEPTH
from server.http.small_json import MAX_CHARS, MAX_LEVELS

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
WIDE = {f"k{i}": i for i in range(10_000)}


def nested(levels: int) -> Any:
    """Lists in one another."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def tool(parameters: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def ablation(**change: Any) -> dict[str, Any]:
    question = {"id": "1", "task": "medical", "question": "q?", "answers": ["a"]}
    return {"questions": [question | change.pop("question", {})], "variants": ["base"], **change}


def deep(levels: int) -> dict[str, Any]:
    return {"a": nested(levels)}


TOO_MUCH: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "/ablation",
        ablation(question={"answers": ["\ufdfa" * 300_000]}),
        "questions.0.answers.0",
        "10000 characters",
    ),
    ("/ablation", ablation(question={"answers": ["a"] * 1001}), "questions.0.answers", "1000"),
    ("/ablation", ablation(choices=[str(i) for i in range(1025)]), "choices", "1024"),
    ("/ablation", ablation(choices=["a", "\ufdfa" * 556]), "choices", "10000 characters"),
    ("/ablation", ablation(tasks=["medical"] * 1025), "tasks", "1024"),
    ("/ablation", ablation(provenance=WIDE), "provenance", f"{MAX_CHARS} characters"),
    ("/ablation", ablation(provenance=deep(MAX_LEVELS)), "provenance", f"{MAX_LEVELS} levels"),
    (
        "/v1/chat/completions",
        CHAT | {"chat_template_kwargs": WIDE},
        "chat_template_kwargs",
        f"{MAX_CHARS} characters",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"chat_template_kwargs": deep(MAX_LEVELS)},
        "chat_template_kwargs",
        f"{MAX_LEVELS} levels",
    ),
    (
        "/tokenize",
        {"messages": CHAT["messages"], "chat_template_kwargs": deep(MAX_LEVELS)},
        "chat_template_kwargs",
        f"{MAX_LEVELS} levels",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"tools": [tool(WIDE)]},
        "tools.0.function.parameters",
        f"{MAX_CHARS} characters",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"tools": [tool(deep(MAX_LEVELS))]},
        "tools.0.function.parameters",
        f"{MAX_LEVELS} levels",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"tools": [tool({"a": "x" * 40_000}, f"f{i}") for i in range(2)]},
        "tools",
        f"{MAX_CHARS} characters",
    ),
    ("/v1/completions", {"model": "base", "prompt": ["a"] * 2049}, "prompt", "2048"),
    ("/generate", {"prompt": "x", "stop": ["a"] * 1025}, "stop", "1024"),
]


@pytest.mark.parametrize(("path", "body", "field", "limit"), TOO_MUCH)
async def test_more_than_a_field_may_hold_is_refused_with_field_and_limit(
    served: Served, path: str, body: dict[str, Any], field: str, limit: str
) -> None:
    error = await refused(served, 422, "invalid_field", path=path, json=body)
    assert error["param" if path.startswith("/v1/") else "field"] == field
    assert limit in error["message"]


async def test_as_much_as_a_field_may_hold_is_taken(served: Served) -> None:
    answers = ["\ufdfa" * 555, *(["a"] * 999)]  # one unified is 18
    largest = {"a": "x" * (MAX_CHARS - len('{"a": ""}'))}
    bodies = [
        ("/ablation", ablation(question={"answers": answers})),
        ("/v1/chat/completions", CHAT | {"chat_template_kwargs": deep(MAX_LEVELS - 1)}),
        ("/v1/chat/completions", CHAT | {"chat_template_kwargs": largest}),
        ("/v1/chat/completions", CHAT | {"tools": [tool(largest)], "tool_choice": "none"}),
    ]
    for path, body in bodies:
        response = await served.client.post(path, json=body)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("text", [b"[" * 500_000 + b"]" * 500_000, b'{"a":' * 100_000])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_body_that_nests_too_deep_is_refused_unread(
    served: Served, path: str, text: bytes
) -> None:
    error = await refused(served, 400, "malformed_body", path=path, content=text)
    assert str(MAX_DEPTH) in error["message"]


async def test_brackets_in_a_text_are_no_depth(served: Served) -> None:
    assert (await served.generate(prompt="[" * 1000)).status_code == 200


async def test_a_body_that_comes_too_slowly_is_a_408_that_says_how_much_came(serve: Serve) -> None:
    """Half a body kept its connection for ever."""
    served = await serve(body_timeout_s=0.1)

    async def half() -> AsyncIterator[bytes]:
        yield b'{"prompt"'
        await asyncio.Event().wait()

    sent: list[Any] = []
    parts = half()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await anext(parts), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    await served.app(SCOPE, receive, send)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    error = json.loads(sent[1]["body"])["error"]
    assert (error["code"], error["field"], error["value"]) == ("request_timeout", "body", 9)


async def test_an_answer_may_take_longer_than_a_body(serve: Serve) -> None:
    served = await serve(body_timeout_s=0.01)
    started = time.monotonic()
    while time.monotonic() < started + 0.1:
        assert (await served.generate()).status_code == 200


async def test_the_health_port_answers_health_and_metrics_alone(serve: Serve) -> None:
    served = await serve(health_port=9)

    async def status(port: int, path: str) -> int:
        scope = SCOPE | {"method": "GET", "path": path, "server": ("127.0.0.1", port)}
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            sent.append(message)

        await served.app(scope, receive, send)
        return int(sent[0]["status"])

    for path in ("/healthz", "/readyz", "/health", "/ping", "/version", "/metrics"):
        assert await status(9, path) == await status(8, path) == 200
    for path in ("/v1/models", "/adapters", "/docs", "/generate", "/nothing"):
        assert await status(9, path) == 404
    assert await status(8, "/v1/models") == 200
