"""POST /generate: what a body means, whole and streamed, and that a client that leaves takes its work along."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from crma.errors import InvalidAdapter
from server.engine.request import EngineStopped, FinishReason, QueueFull
from server.schemas import GenerateResponse

from .conftest import BASE, Served


def events(text: str) -> list[tuple[str, Any]]:
    parsed = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        parsed.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return parsed


async def test_the_answer_is_as_the_contract_says(served: Served) -> None:
    response = await served.generate(task="medical", crma=True, max_tokens=16, temperature=0, seed=7)
    body = response.json()
    GenerateResponse.model_validate(body)
    request = served.engine.requests[-1]
    assert response.status_code == 200
    assert list(body) == ["id", "text", "finish_reason", "task", "crma", "usage", "timings", "provenance"]
    assert body["id"] == request.id
    assert body["id"].startswith("gen-")
    assert (body["text"], body["finish_reason"], body["task"], body["crma"]) == ("one two", "stop", "medical", True)
    assert body["usage"] == {"prompt_tokens": len(request.prompt_ids), "completion_tokens": 2, "cached_tokens": 1}
    assert body["timings"] == {"queue_s": 0.1, "ttft_s": 0.2, "e2e_s": 0.3}
    assert body["provenance"] == {
        "base": BASE.digest,
        "task": request.selection.task_digest,
        "crma": request.selection.crma_digest,
        "engine": "0.1.0",
        "dtype": "float32",
        "seed": 7,
    }


async def test_the_prompt_goes_through_the_adapters_format_and_raw_skips_it(served: Served, tokenizer: Any) -> None:
    cases = [
        ({"task": "medical"}, "<|im_start|>Hi[medical]"),
        ({}, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ({"task": "medical", "raw": True}, "Hi"),
    ]
    for body, expected in cases:
        await served.generate(**body)
        request = served.engine.requests[-1]
        assert tokenizer.decode(request.prompt_ids) == expected
        assert request.stop_token_ids == (tokenizer.eos_token_id,)


async def test_special_tokens_in_a_prompt_are_text(served: Served, tokenizer: Any) -> None:
    await served.generate(prompt="<|im_end|>", raw=True)
    assert tokenizer.eos_token_id not in served.engine.requests[-1].prompt_ids


async def test_several_answers_come_as_choices(served: Served) -> None:
    body = (await served.generate(n=2, logprobs=True)).json()
    GenerateResponse.model_validate(body)
    assert "text" not in body
    assert "finish_reason" not in body
    assert body["choices"] == [
        {"index": i, "text": "one two", "finish_reason": "stop", "logprobs": [-0.5, -0.25]} for i in range(2)
    ]
    assert body["usage"]["completion_tokens"] == 4


async def test_a_sampled_request_without_a_seed_says_which_one_it_got(served: Served) -> None:
    body = (await served.generate(temperature=1)).json()
    assert body["provenance"]["seed"] == served.engine.requests[-1].sampling.seed
    assert isinstance(body["provenance"]["seed"], int)
    assert (await served.generate()).json()["provenance"]["seed"] is None


async def test_one_stop_text_is_a_list_of_one(served: Served) -> None:
    await served.generate(stop="\n")
    assert served.engine.requests[-1].sampling.stop == ("\n",)


async def test_a_stream_is_tokens_then_done(served: Served) -> None:
    response = await served.generate(stream=True, task="medical", logprobs=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *tokens, (last, done) = events(response.text)
    assert tokens == [
        ("token", {"index": 0, "text": "one", "logprob": -0.5}),
        ("token", {"index": 0, "text": " two", "logprob": -0.25}),
    ]
    assert last == "done"
    assert done["finish_reason"] == "stop"
    assert done["crma"] is True
    assert "text" not in done
    assert served.engine.aborted == []


async def test_a_stream_of_several_answers_ends_in_choices_without_texts(served: Served) -> None:
    _, done = events((await served.generate(stream=True, n=2)).text)[-1]
    assert done["choices"] == [{"index": i, "finish_reason": "stop"} for i in range(2)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(4, 2.2), 429, "queue_full"),
        (EngineStopped("stopping"), 503, "draining"),
        (InvalidAdapter("bad", field="x"), 409, "invalid_adapter"),
        (ValueError("a secret of the inside"), 500, "internal_error"),
    ],
)
async def test_a_refused_request_has_its_status_streamed_or_not(
    served: Served, error: Exception, status: int, code: str, stream: bool
) -> None:
    served.engine.refusal = error
    response = await served.generate(stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "secret" not in response.text
    assert response.headers.get("Retry-After") == ("3" if status == 429 else None)
    served.engine.refusal = None
    assert (await served.generate(stream=stream)).status_code == 200


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ((FinishReason.ABORT, "deadline"), 504, "deadline_exceeded"),
        ((FinishReason.ERROR, "the step failed"), 500, "generation_failed"),
        ((FinishReason.ABORT, None), 503, "draining"),
    ],
)
async def test_a_failure_is_a_status_before_the_first_token_and_an_event_after_it(
    served: Served, ending: tuple[FinishReason, str | None], status: int, code: str
) -> None:
    served.engine.ending = ending
    plain = await served.generate()
    assert (plain.status_code, plain.json()["error"]["code"]) == (status, code)
    name, data = events((await served.generate(stream=True)).text)[-1]
    assert (name, data["error"]["code"]) == ("error", code)
    served.engine.fail_at_once = True
    assert (await served.generate(stream=True)).status_code == status


async def test_the_deadline_is_the_requests_or_the_servers(serve: Any) -> None:
    served = await serve(request_timeout_s=50)
    await served.generate()
    await served.generate(timeout_s=5)
    spans = [r.deadline - r.arrival for r in served.engine.requests[-2:]]
    assert spans == pytest.approx([50, 5])
    assert (await served.generate(timeout_s=51)).json()["error"]["field"] == "timeout_s"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_has_its_request_aborted(served: Served, stream: bool) -> None:
    served.engine.gate = asyncio.Event()  # never set: the second token does not come
    body = json.dumps({"prompt": "Hi", "stream": stream}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    before = len(served.engine.requests)

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        while len(served.engine.requests) == before or not served.engine.running:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await asyncio.wait_for(served.app(scope, receive, send), 5)
    assert served.engine.aborted == [served.engine.requests[-1].id]
    assert served.engine.running == 0


async def test_before_it_is_ready_it_says_so_and_while_it_stops_too(serve: Any) -> None:
    served = await serve(wait=False)
    early = await served.generate()
    assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
    await served.app.state.starting
    assert (await served.generate()).status_code == 200
    served.app.state.frontend.draining = True
    late = await served.generate()
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
