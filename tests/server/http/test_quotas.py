"""Limits of a key over HTTP: 429 with Retry-After, and streams that count until they end."""

import asyncio
from pathlib import Path
from typing import Any

import api_keys
import httpx
import pytest
from api import SCOPE, Serve, Served
from api_keys import Headers
from starlette.requests import ClientDisconnect


async def limited(serve: Serve, file: Path, **limits: Any) -> tuple[Served, Headers]:
    """A server, and a key of it with these limits."""
    headers = api_keys.add(file, "web", "generate", "ablate", **limits)
    return await serve(keys_file=file), headers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


async def ask(served: Served, headers: Headers, **body: Any) -> httpx.Response:
    return await served.client.post("/generate", json={"prompt": "Hi", **body}, headers=headers)


def refusal(response: httpx.Response) -> tuple[int, str, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["field"], response.headers["Retry-After"]


async def test_one_request_too_many_in_a_minute_is_429_with_retry_after(
    serve: Serve, file: Path
) -> None:
    served, headers = await limited(serve, file, requests_per_minute=2)
    assert [(await ask(served, headers)).status_code for _ in range(2)] == [200, 200]
    status, code, field, wait_s = refusal(await ask(served, headers))
    assert (status, code, field) == (429, "rate_limit_exceeded", "requests_per_minute")
    assert int(wait_s) in (29, 30)
    other = api_keys.add(file, "other")
    served.app.state.frontend.keys.refresh()
    assert (await ask(served, other)).status_code == 200
    openai = {"model": "base", "prompt": "Hi"}
    answer = await served.client.post("/v1/completions", json=openai, headers=headers)
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    listed = await served.client.get("/v1/models", headers=headers)
    assert listed.status_code == 200  # it computes nothing


async def test_tokens_of_prompt_and_answer_are_counted(serve: Serve, file: Path) -> None:
    served, headers = await limited(serve, file, tokens_per_minute=10)
    usage = (await ask(served, headers, max_tokens=2, n=3)).json()["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] > 10
    status, _, field, wait_s = refusal(await ask(served, headers))
    assert (status, field) == (429, "tokens_per_minute")
    debt = usage["prompt_tokens"] + usage["completion_tokens"] - 10
    assert abs(int(wait_s) - (debt + 1) * 6) <= 1


async def test_a_refused_request_uses_no_tokens(serve: Serve, file: Path) -> None:
    served, headers = await limited(serve, file, tokens_per_minute=1)
    for body in ({"task": "nothing"}, {"temperature": -1}):
        assert (await ask(served, headers, **body)).status_code in (404, 422)
    assert (await ask(served, headers)).status_code == 200


async def test_a_request_that_failed_or_was_refused_leaves_its_place(
    serve: Serve, file: Path
) -> None:
    served, headers = await limited(serve, file, max_concurrent=1)
    for body in ({"task": "nothing"}, {"temperature": -1}, {}):
        await ask(served, headers, **body)
    assert (await ask(served, headers)).status_code == 200


@pytest.mark.parametrize("ends", ["done", "disconnect"])
async def test_a_stream_counts_until_it_ends_or_its_client_is_gone(
    serve: Serve, file: Path, ends: str
) -> None:
    """Streams that count only until their first byte would not be limited at all."""
    served, headers = await limited(serve, file, max_concurrent=1)
    sent = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    sent.append((b"content-type", b"application/json"))
    body = b'{"prompt": "Hi", "stream": true}'
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": body}]
    first_event, may_go_on = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            first_event.set()
            if ends == "disconnect":
                await gone.wait()
                raise OSError("gone")
            await may_go_on.wait()

    scope = SCOPE | {"headers": sent, "asgi": {"spec_version": "2.4"}}
    stream = asyncio.ensure_future(served.app(scope, receive, send))
    await first_event.wait()
    assert refusal(await ask(served, headers))[2] == "max_concurrent"
    gone.set() if ends == "disconnect" else may_go_on.set()
    if ends == "disconnect":
        with pytest.raises(ClientDisconnect):
            await stream
    else:
        await stream
    assert (await ask(served, headers)).status_code == 200
