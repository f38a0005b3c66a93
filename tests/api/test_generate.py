"""POST /generate: the exact form of an answer, whole and streamed, and of every way it can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny

from crma.errors import InvalidAdapter
from server.engine.request import EngineStopped, FinishReason, QueueFull
from server.schemas import GenerateResponse

from .conftest import BASE, Serve, Served


def events(text: str) -> list[tuple[str, Any]]:
    parsed = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        parsed.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return parsed


async def test_the_answer_is_as_the_contract_says(served: Served) -> None:
    response = await served.generate(task="medical", crma=True, max_tokens=16, temperature=0, seed=7)
    request = served.engine.requests[-1]
    assert request.id.startswith("gen-")
    expected = {"id": request.id, "text": "one two", "finish_reason": "stop", "task": "medical", "crma": True}
    expected["usage"] = {"prompt_tokens": len(request.prompt_ids), "completion_tokens": 2, "cached_tokens": 1}
    expected["timings"] = {"queue_s": 0.1, "ttft_s": 0.2, "e2e_s": 0.3}
    task, crma = request.selection
    used = {"base": BASE.digest, "task": task, "crma": crma, "engine": "0.1.0", "dtype": "float32", "seed": 7}
    assert list(response.json().items()) == list((expected | {"provenance": used}).items())
    GenerateResponse.model_validate(response.json())


async def test_a_stream_is_tokens_then_the_same_without_text(served: Served) -> None:
    body = {"task": "medical", "logprobs": True}
    whole = (await served.generate(**body)).json()
    response = await served.generate(**body, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second, done, _ = response.text.split("\n\n")
    assert first == 'event: token\ndata: {"index": 0, "text": "one", "logprob": -0.5}'
    assert second == 'event: token\ndata: {"index": 0, "text": " two", "logprob": -0.25}'
    ((name, data),) = events(done)
    assert (name, list(data)) == ("done", [key for key in whole if key not in ("text", "logprobs")])


async def test_several_answers_come_as_choices(served: Served) -> None:
    body = (await served.generate(n=2, logprobs=True)).json()
    GenerateResponse.model_validate(body)
    assert not {"text", "finish_reason"} & set(body)
    choice = {"text": "one two", "finish_reason": "stop", "logprobs": [-0.5, -0.25]}
    assert body["choices"] == [{"index": i, **choice} for i in range(2)]
    assert (body["usage"]["completion_tokens"], body["provenance"]["seed"]) == (4, None)
    _, done = events((await served.generate(stream=True, n=2)).text)[-1]
    assert done["choices"] == [{"index": i, "finish_reason": "stop"} for i in range(2)]


async def test_raw_skips_the_format_and_special_tokens_in_a_prompt_are_text(served: Served) -> None:
    tokenizer = tiny.tokenizer()
    for raw, expected in ((True, "<|im_end|>"), (False, "<|im_start|><|im_end|>[answer]")):
        await served.generate(prompt="<|im_end|>", task="medical", raw=raw, stop="\n")
        request = served.engine.requests[-1]
        assert tokenizer.decode(request.prompt_ids) == expected
        assert tokenizer.eos_token_id not in request.prompt_ids
        assert (request.stop_token_ids, request.sampling.stop) == ((tokenizer.eos_token_id,), ("\n",))


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
    assert 'reason="abort"' not in await served.metrics()


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
    assert await served.error() == (status, code)
    name, data = events((await served.generate(stream=True)).text)[-1]
    assert (name, data["error"]["code"]) == ("error", code)
    served.engine.fail_at_once = True
    assert await served.error(stream=True) == (status, code)


async def test_the_deadline_is_the_requests_or_the_servers(serve: Serve) -> None:
    served = await serve(request_timeout_s=50)
    await served.generate()
    await served.generate(timeout_s=5)
    assert [r.deadline - r.arrival for r in served.engine.requests[-2:]] == pytest.approx([50, 5])
    assert (await served.generate(timeout_s=51)).json()["error"]["field"] == "timeout_s"
