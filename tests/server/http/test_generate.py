"""POST /generate: the exact form of an answer, whole and streamed, and of every failure."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import api_keys
import pytest
import tiny
from api import BASE, SCOPE, Serve, Served
from starlette.requests import ClientDisconnect

from crma.core.errors import InvalidAdapter
from crma.models.prompts import RAW_FORMAT
from crma.store.adapter_store import AdapterStore
from server.engine.errors import EngineStopped, QueueFull
from server.engine.request import FinishReason, SamplingParams
from server.http.body import EXAMPLES
from server.http.schemas import GenerateRequest
from server.service.caller import ANYONE

ABORT, ERROR = FinishReason.ABORT, FinishReason.ERROR
# What the engine raises at once, and the status and code of the answer.
REFUSALS = [
    (QueueFull(4, 2.2), 429, "queue_full"),
    (InvalidAdapter("bad", field="x"), 409, "invalid_adapter"),
    (EngineStopped("end"), 503, "draining"),
    (ValueError("a secret of the inside"), 500, "internal_error"),
]
# How a request ends in the engine, and the status and code of the answer.
FAILURES = [
    ((ABORT, "deadline"), 504, "deadline_exceeded"),
    ((ABORT, "unloaded"), 409, "adapter_unloaded"),
    ((ABORT, "lost"), 503, "replica_lost"),
    ((ERROR, "the step failed"), 500, "generation_failed"),
    ((ABORT, None), 503, "server_stopped"),
]


def events(text: str) -> list[tuple[str, Any]]:
    """The name and data of each server-sent event."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_an_answer_has_the_documented_fields_in_their_order(served: Served) -> None:
    asked = {"task": "medical", "crma": True, "max_tokens": 16, "temperature": 0, "seed": 7}
    response = await served.generate(**asked)
    request = served.engine.requests[-1]
    assert request.id.startswith("gen-")
    expected = {
        "id": request.id,
        "text": "one two",
        "finish_reason": "stop",
        "task": "medical",
        "crma": True,
        "usage": {
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": 2,
            "cached_tokens": 1,
        },
        "timings": {"queue_s": 0.1, "ttft_s": 0.2, "e2e_s": 0.3},
        "provenance": {
            "base": BASE.digest,
            "task": request.selection.task_digest,
            "crma": request.selection.crma_digest,
            "engine": "0.1.0",
            "dtype": "float32",
            "seed": 7,
        },
    }
    assert list(response.json().items()) == list(expected.items())
    example = EXAMPLES["/generate"]["answers"]["application/json"]["example"]
    assert list(expected) == list(example)


async def test_a_stream_sends_a_token_an_event_and_then_the_rest_of_the_answer(
    served: Served,
) -> None:
    body = {"task": "medical", "logprobs": True}
    whole = (await served.generate(**body)).json()
    response = await served.generate(**body, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second, done, _ = response.text.split("\n\n")
    assert first == 'event: token\ndata: {"index": 0, "text": "one", "logprob": -0.5}'
    assert second == 'event: token\ndata: {"index": 0, "text": " two", "logprob": -0.25}'
    ((name, data),) = events(done)
    assert name == "done"
    assert list(data) == [key for key in whole if key not in ("text", "logprobs")]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_is_told_whether_outputs_are_seen_as_they_come(
    served: Served, stream: bool
) -> None:
    await served.generate(stream=stream)
    assert served.engine.requests[-1].is_streamed is stream


async def test_top_logprobs_come_with_each_token_and_prompt_logprobs_with_the_answer(
    served: Served,
) -> None:
    asked = {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": True}
    body = (await served.generate(**asked)).json()
    top = [{"id": i, "token": tiny.tokenizer().decode([i]), "logprob": -i} for i in range(2)]
    assert body["logprobs"] == [-0.5, -0.25]
    assert body["top_logprobs"] == [top, top]
    assert body["prompt_logprobs"] == [None] + [-1.0] * (body["usage"]["prompt_tokens"] - 1)
    first, _, (_, done) = events((await served.generate(**asked, stream=True)).text)
    assert first == ("token", {"index": 0, "text": "one", "logprob": -0.5, "top_logprobs": top})
    assert done["prompt_logprobs"] == body["prompt_logprobs"]


async def test_every_sampling_option_reaches_the_engine(served: Served) -> None:
    asked = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1.5,
        "frequency_penalty": 2.0,
        "seed": 5,
        "n": 2,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    listed = {"stop": ["a", "b"], "stop_token_ids": [5, 6], "logit_bias": {"7": -100, "8": 0.5}}
    expected = SamplingParams(
        **asked,
        stop=("a", "b"),
        stop_token_ids=(5, 6),
        logit_bias=((7, -100), (8, 0.5)),
        logprobs=20,
    )
    body = {**asked, **listed, "timeout_s": 5}
    messages = [{"role": "user", "content": "Hi"}]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"prompt": "Hi", "logprobs": True, "top_logprobs": 20}),
        ("/v1/completions", {"model": "base", "prompt": "Hi", "logprobs": 20}),
        (
            "/v1/chat/completions",
            {"model": "base", "messages": messages, "logprobs": True, "top_logprobs": 20},
        ),
    ]
    for path, more in requests:
        response = await served.client.post(path, json=body | more)
        assert response.status_code == 200, response.text
        request = served.engine.requests[-1]
        assert request.sampling == expected
        assert request.deadline - request.arrival == pytest.approx(5)


async def test_a_temperature_may_be_tiny_and_minus_one_turns_top_k_off(served: Served) -> None:
    await served.generate(temperature=0.001, top_k=-1)
    sampling = served.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k) == (0.001, 0)


async def test_a_field_that_is_null_is_left_out(served: Served) -> None:
    names = [name for name in GenerateRequest.model_fields if name not in ("prompt", "seed")]
    assert (await served.generate(**dict.fromkeys(names))).status_code == 200
    assert served.engine.requests[-1].sampling == SamplingParams()


async def test_several_answers_come_as_choices(served: Served) -> None:
    body = (await served.generate(n=2, logprobs=True)).json()
    assert not {"text", "finish_reason"} & set(body)
    choice = {"text": "one two", "finish_reason": "stop", "logprobs": [-0.5, -0.25]}
    assert body["choices"] == [{"index": i, **choice} for i in range(2)]
    assert body["usage"]["completion_tokens"] == 4
    assert body["provenance"]["seed"] is None
    _, done = events((await served.generate(stream=True, n=2)).text)[-1]
    assert done["choices"] == [{"index": i, "finish_reason": "stop"} for i in range(2)]


@pytest.mark.parametrize(
    ("raw", "expected", "num_special"),
    [(True, "<|im_end|>", 1), (False, "<|im_start|><|im_end|>[answer]", 0)],
)
async def test_raw_skips_the_prompt_format_and_only_raw_prompts_have_special_tokens(
    served: Served, raw: bool, expected: str, num_special: int
) -> None:
    tokenizer = tiny.tokenizer()
    await served.generate(prompt="<|im_end|>", task="medical", raw=raw, stop="\n")
    request = served.engine.requests[-1]
    assert tokenizer.decode(request.prompt_ids) == expected
    assert request.prompt_ids.count(tokenizer.eos_token_id) == num_special
    assert request.stop_token_ids == (tokenizer.eos_token_id,)
    assert request.sampling.stop == ("\n",)


async def test_whether_special_tokens_are_added_is_the_choice_of_raw_prompts_only(
    served: Served,
) -> None:
    for chosen in (True, False, None):
        answer = await served.generate(raw=True, add_special_tokens=chosen)
        assert answer.status_code == 200
    assert await served.error(add_special_tokens=False) == (422, "invalid_field")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), REFUSALS)
async def test_a_refusal_has_its_status_whether_streamed_or_not(
    served: Served, error: Exception, status: int, code: str, stream: bool
) -> None:
    served.engine.refusal = error
    response = await served.generate(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text
    retry_after = {429: "3", 503: "1"}.get(status)
    assert response.headers.get("Retry-After") == retry_after
    if code == "queue_full":
        assert f"try again in {retry_after} s" in response.json()["error"]["message"]
    served.engine.refusal = None
    assert (await served.generate(stream=stream)).status_code == 200
    assert not re.search(r'reason="abort"} [1-9]', await served.metrics())


@pytest.mark.parametrize(("ending", "status", "code"), FAILURES)
async def test_a_failure_is_a_status_before_the_first_token_and_an_event_after_it(
    served: Served, ending: tuple[FinishReason, str | None], status: int, code: str
) -> None:
    served.engine.ending = ending
    assert await served.error() == (status, code)
    name, data = events((await served.generate(stream=True)).text)[-1]
    assert name == "error"
    assert data["error"]["code"] == code
    served.engine.fail_at_once = True
    assert await served.error(stream=True) == (status, code)


async def test_the_deadline_is_the_requests_within_the_servers_limit(serve: Serve) -> None:
    served = await serve(request_timeout_s=50)
    await served.generate()
    await served.generate(timeout_s=5)
    default, own = served.engine.requests[-2:]
    assert default.deadline - default.arrival == pytest.approx(50)
    assert own.deadline - own.arrival == pytest.approx(5)
    assert (await served.generate(timeout_s=51)).json()["error"]["field"] == "timeout_s"


async def test_a_stream_whose_client_has_gone_keeps_no_place_in_the_engine(served: Served) -> None:
    """The client leaves before the response's head is written, so its first event is never read."""
    received = [{"type": "http.request", "body": b'{"prompt": "Hi", "stream": true}'}]

    async def receive() -> dict[str, Any]:
        if not received:
            await asyncio.Event().wait()  # for ever
        return received.pop()

    async def send(message: dict[str, Any]) -> None:
        assert served.engine.running == 1
        raise OSError("gone")

    with pytest.raises(ClientDisconnect):
        await served.app(SCOPE | {"asgi": {"spec_version": "2.4"}}, receive, send)
    assert served.engine.running == 0


async def test_prompts_that_wait_to_be_encoded_are_bounded(serve: Serve) -> None:
    frontend = (await serve(max_queue=1)).app.state.frontend
    sampling = SamplingParams()
    resolved = frontend.resolve(None, None, caller=ANYONE)
    asked = [frontend.generation("Hi", resolved, sampling) for _ in range(4)]
    *_, waited, refused = await asyncio.gather(*asked, return_exceptions=True)
    assert waited.request.sampling == sampling
    assert type(refused) is QueueFull


async def test_variants_are_asked_in_one_prompt_format(serve: Serve, own: AdapterStore) -> None:
    """The base model was asked through its chat template, and a task in its own: not alike."""
    tiny.publish(own, BASE, "plain", 3, prompt_format=RAW_FORMAT)
    served = await serve(store=own.root)

    async def asked(**fields: Any) -> tuple[int, ...]:
        assert (await served.generate(**fields)).status_code == 200
        return tuple(served.engine.requests[-1].prompt_ids)

    alone = await asked(task="plain")
    base = await asked()
    assert alone != base
    assert await asked(format_of="plain") == alone
    assert await asked(format_of="plain@v1", crma=True) == alone
    assert await asked(task="plain", format_of="base") == base
    assert served.engine.requests[-1].selection.task_digest == own.task("plain").digest
    body = {"format_of": "nowhere"}
    unknown = (await served.generate(**body)).json()["error"]
    assert (unknown["code"], unknown["field"]) == ("not_found", "format_of")
    both = (await served.generate(format_of="plain", raw=True)).json()["error"]
    assert (both["code"], both["field"]) == ("invalid_field", "format_of")


async def test_the_format_of_a_task_that_a_key_may_not_use_is_that_of_an_unknown_one(
    serve: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    narrow = api_keys.add(file, "narrow", "generate", tasks=["medical"])
    served = await serve(keys_file=file)
    errors = []
    for name in ("legal", "nowhere"):
        body = {"prompt": "Hi", "format_of": name}
        answer = await served.client.post("/generate", json=body, headers=narrow)
        errors.append((answer.status_code, answer.text.replace(name, "NAME")))
    assert errors[0] == errors[1]
    assert errors[0][0] == 404
