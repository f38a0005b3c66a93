"""One caller attacks the real server; /healthz, and another caller's request, must not notice."""

import json
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from health_probe import Watch, watched
from server_process import running_server

pytestmark = pytest.mark.e2e

MAX_HEALTHZ_S = 0.25
ALICE = {"Authorization": "Bearer alice"}
BOB = {"Authorization": "Bearer bob"}
CHAT: dict[str, Any] = {
    "model": "base",
    "max_tokens": 1,
    "messages": [{"role": "system", "content": "y"}, {"role": "user", "content": "x"}],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with two keys."""
    kept = str(tmp_path_factory.mktemp("kept"))
    with running_server(CRMA_API_KEYS="alice,bob", CRMA_EVALUATIONS=kept) as url:
        yield url


def nested(levels: int) -> str:
    return "[" * levels + "1" + "]" * levels


def many(count: int, item: str) -> str:
    return "[" + ",".join([item] * count) + "]"


def with_json(body: dict[str, Any], text: str) -> str:
    """The JSON of a body in which "X" is replaced by other JSON."""
    return json.dumps(body, ensure_ascii=False).replace('"X"', text)


def ablation(answers: Any = ("a",), count: int = 1, **more: Any) -> dict[str, Any]:
    question = {"task": "medical", "question": "q?", "answers": answers}
    return {
        "questions": [{"id": str(i), **question} for i in range(count)],
        "variants": ["base"],
        **more,
    }


def tools(parameters: Any, count: int = 1) -> dict[str, Any]:
    functions = [{"name": f"f{i}", "parameters": parameters} for i in range(count)]
    return {"tools": [{"type": "function", "function": each} for each in functions]}


WIDE = {f"p{i}": {"type": "string"} for i in range(30_000)}
DEEP = many(1200, nested(400))
BODIES: dict[str, tuple[str, str]] = {
    "an answer of 340,000 U+FDFA": (
        "/ablation",
        with_json(ablation(["\ufdfa" * 340_000], max_tokens=1), ""),
    ),
    "34 answers of 9,900 U+FDFA": (
        "/ablation",
        with_json(ablation(["\ufdfa" * 9900], 34, max_tokens=1), ""),
    ),
    "200,000 answers": ("/ablation", with_json(ablation("X"), many(200_000, '"a"'))),
    "200,000 answers of a wrong type": ("/ablation", with_json(ablation("X"), many(200_000, "1"))),
    "300,000 questions": ("/ablation", f'{{"questions": {many(300_000, "1")}}}'),
    "10,000 questions in eight variants": (
        "/ablation",
        with_json(ablation(count=10_000) | {"variants": ["base"] * 8, "repeat": True}, ""),
    ),
    "a deep provenance": ("/ablation", with_json(ablation(provenance={"a": "X"}), DEEP)),
    "a wide provenance": (
        "/ablation",
        with_json(ablation(provenance=dict.fromkeys(map(str, range(60_000)), 1)), ""),
    ),
    "a deep body": ("/generate", nested(500_000)),
    "a deep field": ("/generate", f'{{"prompt": {many(500, nested(950))}}}'),
    "deep chat_template_kwargs": (
        "/v1/chat/completions",
        with_json(CHAT | {"chat_template_kwargs": {"a": "X"}}, DEEP),
    ),
    "wide chat_template_kwargs": (
        "/v1/chat/completions",
        with_json(CHAT | {"chat_template_kwargs": {"a": "X"}}, many(300_000, "[]")),
    ),
    "deep tool parameters": (
        "/v1/chat/completions",
        with_json(CHAT | tools({"a": "X"}), many(1200, nested(400))),
    ),
    "wide tool parameters": ("/v1/chat/completions", with_json(CHAT | tools(WIDE), "")),
    "many tools": (
        "/v1/chat/completions",
        with_json(CHAT | tools(dict(list(WIDE.items())[:250]), 100), ""),
    ),
    "a deep schema": (
        "/generate",
        with_json({"prompt": "x", "structured_outputs": {"json": {"a": "X"}}}, DEEP),
    ),
    "a wide schema": (
        "/generate",
        with_json({"prompt": "x", "structured_outputs": {"json": {"properties": WIDE}}}, ""),
    ),
    "messages of a wrong type": (
        "/v1/chat/completions",
        with_json({"model": "base", "messages": "X"}, many(30_000, '{"role": 1, "content": 1}')),
    ),
    "14,000 tool calls": (
        "/v1/chat/completions",
        with_json(
            CHAT | {"messages": [{"role": "assistant", "content": "", "tool_calls": "X"}]},
            many(14_000, '{"id": "1", "function": {"name": "f", "arguments": "{}"}}'),
        ),
    ),
    "200,000 prompts": (
        "/v1/completions",
        f'{{"model": "base", "prompt": {many(200_000, "[1]")}}}',
    ),
    "200,000 token ids that are none": (
        "/v1/completions",
        f'{{"model": "base", "prompt": [{many(200_000, "1.5")}]}}',
    ),
    "330,000 token ids": (
        "/v1/completions",
        f'{{"model": "base", "prompt": {many(330_000, "1")}}}',
    ),
    "300,000 stops of a wrong type": (
        "/generate",
        f'{{"prompt": "x", "stop": {many(300_000, "1")}}}',
    ),
    "70,000 biases of a wrong type": (
        "/generate",
        json.dumps({"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(70_000)), "x")}),
    ),
    "70,000 metadata of a wrong type": (
        "/v1/responses",
        json.dumps(
            {"model": "base", "input": "x", "metadata": dict.fromkeys(map(str, range(70_000)), 1)}
        ),
    ),
    "80,000 items of input": (
        "/v1/responses",
        f'{{"model": "base", "input": {many(80_000, "{}")}}}',
    ),
    "200,000 token ids to decode that are none": (
        "/detokenize",
        f'{{"tokens": {many(200_000, "null")}}}',
    ),
    "a number of 900,000 digits": (
        "/generate",
        f'{{"prompt": "x", "max_tokens": {"9" * 900_000}}}',
    ),
    "170,000 halves of surrogate pairs": (
        "/generate",
        f'{{"prompt": "{chr(92)}ud800{"a" * 900_000}"}}',
    ),
}


def check_health(watch: Watch) -> None:
    assert watch.num_failed == 0
    assert watch.num_asked > 3
    assert watch.slowest_s < MAX_HEALTHZ_S


@pytest.mark.parametrize("name", BODIES)
def test_no_body_holds_up_health(server: str, name: str) -> None:
    """An answer of 340,000 U+FDFA held the event loop for 11.9 s."""
    path, body = BODIES[name]
    with watched(server) as watch:
        headers = ALICE | {"Content-Type": "application/json"}
        response = httpx.post(f"{server}{path}", content=body, headers=headers, timeout=60)
    assert response.status_code < 500, response.text
    check_health(watch)


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_holds_up_health(server: str, stream: bool) -> None:
    """20 log-probabilities for each of 2,000 tokens, eight times, took 4.5 s of the event loop."""
    ids = [(i * 37) % 40_000 + 300 for i in range(2000)]
    body = {"model": "base", "prompt": ids, "echo": True, "logprobs": 20, "n": 8, "max_tokens": 1}
    with watched(server) as watch:
        response = httpx.post(
            f"{server}/v1/completions", json=body | {"stream": stream}, headers=ALICE, timeout=120
        )
    assert response.status_code == 200
    check_health(watch)


def test_long_prompts_of_one_key_hold_up_no_other(server: str) -> None:
    """A word of another key took 20.8 s, and `timeout_s: 0.5` was answered after 13.8 s."""
    long = {"prompt": ("word and more " * 75_000)[:1_040_000], "max_tokens": 1}
    fits = {"prompt": "word " * 30_000, "max_tokens": 1}  # by its characters alone
    with watched(server) as watch, ThreadPoolExecutor(40) as pool:
        attacks = [
            pool.submit(httpx.post, f"{server}/generate", json=body, headers=ALICE, timeout=120)
            for body in (long, fits) * 20
        ]
        time.sleep(0.5)  # they are on their way
        for timeout_s in (5.0, 0.5):
            started = time.monotonic()
            body = {"prompt": "Hi", "max_tokens": 1, "timeout_s": timeout_s}
            response = httpx.post(f"{server}/generate", json=body, headers=BOB, timeout=60)
            assert time.monotonic() - started < timeout_s + MAX_HEALTHZ_S
            assert response.status_code == 200 or timeout_s == 0.5
        statuses = {attack.result().status_code for attack in attacks}
    assert statuses == {400}
    check_health(watch)


def test_idle_connections_do_not_blind_health(tmp_path: Path) -> None:
    """1,100 of them took all 1,024 descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1:] * 2)
    kept = str(tmp_path)
    with (
        running_server(max_descriptors=1024, CRMA_EVALUATIONS=kept) as url,
        ExitStack() as idle,
    ):
        host, port = urlsplit(url).netloc.split(":")
        with watched(url) as watch:
            for _ in range(1100):
                idle.enter_context(socket.create_connection((host, int(port))))
            response = httpx.post(f"{url}/generate", json={"prompt": "Hi"}, timeout=60)
            assert response.status_code == 200
        check_health(watch)
