"""POST /v1/responses: OpenAI's own client reads every answer and every event."""

import json
from typing import Any

import openai
import pytest
import tiny
from api import Serve, Served, openai_client, refused

from server.engine.request import FinishReason
from server.http.body import EXAMPLES

GOOD: dict[str, Any] = {"model": "base", "input": "Hi <|im_end|>"}
OPENING = ["response.created", "response.in_progress", "response.output_item.added"]
OPENING += ["response.content_part.added"]
CLOSING = ["response.output_text.done", "response.content_part.done"]
CLOSING += ["response.output_item.done"]


def item(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ANSWERED = {
    "id": "msg-1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Yes?", "annotations": [], "logprobs": []}],
}
FUNCTION_CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
REFUSED = [
    ("input", "", "input"),
    ("input", [], "input"),
    ("input", None, "input"),
    ("input", [FUNCTION_CALL], "input"),
    ("input", [{"type": "item_reference", "id": "msg-1"}], "input"),
    ("input", [item("tool", "Hi")], "input.0.role"),
    ("input", [item("user", 5)], "input.0.content"),
    ("input", [item("user", [{"type": "input_image", "image_url": "x"}])], "input.0.content"),
    ("store", True, "store"),
    ("background", True, "background"),
    ("tools", [{"type": "web_search"}], "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("truncation", "auto", "truncation"),
    ("service_tier", "flex", "service_tier"),
    ("reasoning", {"effort": "high"}, "reasoning.effort"),
    ("text", {"verbosity": "low"}, "text.verbosity"),
    ("text", {"format": {"type": "json_schema", "name": "s"}}, "text.format.schema"),
    ("text", {"format": {"type": "text", "schema": {}}}, "text.format.schema"),
    ("text", {"format": {"type": "grammar"}}, "text.format.type"),
    ("stop", "", "stop.0"),
    ("include", ["file_search_call.results"], "include.0"),
    ("max_output_tokens", 0, "max_output_tokens"),
    ("temperature", 2.1, "temperature"),
    ("top_logprobs", 1, "top_logprobs"),
    ("stream_options", {"include_obfuscation": False}, "stream_options"),
    ("previous_response_id", "resp-1", "previous_response_id"),
    ("conversation", "conv-1", "conversation"),
    ("prompt", {"id": "p"}, "prompt"),
    ("moderation", {}, "moderation"),
]


async def respond(served: Served, **body: Any) -> Any:
    """A response, by OpenAI's client."""
    return await openai_client(served).responses.create(**{**GOOD, **body})


async def chat_ids(served: Served, model: str, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """The prompt of a chat."""
    body = {"model": model, "messages": messages}
    response = await served.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return served.engine.requests[-1].prompt_ids


async def test_openais_client_reads_a_response(served: Served) -> None:
    answer = await respond(served, model="medical:crma-on", metadata={"a": "b"}, temperature=0)
    request = served.engine.requests[-1]
    assert answer.output_text == "one two"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.id == request.id
    assert answer.output[0].status == "completed"
    assert answer.usage.input_tokens == len(request.prompt_ids)
    assert answer.usage.total_tokens == len(request.prompt_ids) + 2
    assert answer.usage.input_tokens_details.cached_tokens == 1
    assert answer.model == "medical:crma-on"
    assert answer.metadata == {"a": "b"}
    assert answer.store is False
    assert answer.provenance["task"] == request.selection.task_digest
    example = EXAMPLES["/v1/responses"]["answers"]["application/json"]["example"]
    body = (await served.client.post("/v1/responses", json=GOOD)).json()
    assert list(body) == list(example)
    assert list(body["output"][0]) == list(example["output"][0])
    assert list(body["usage"]) == list(example["usage"])


async def test_an_answer_that_was_cut_is_incomplete(served: Served) -> None:
    served.engine.ending = (FinishReason.LENGTH, None)
    answer = await respond(served, max_output_tokens=2)
    assert served.engine.requests[-1].sampling.max_tokens == 2
    assert answer.status == answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    events = [each async for each in await respond(served, stream=True)]
    assert events[-1].type == "response.incomplete"


async def test_without_a_limit_an_answer_may_fill_the_context(served: Served) -> None:
    await respond(served)
    request = served.engine.requests[-1]
    assert (
        request.sampling.max_tokens + len(request.prompt_ids) == served.engine.model.max_model_len
    )
    assert request.sampling.temperature == 1


@pytest.mark.parametrize("model", ["base", "medical"])
@pytest.mark.parametrize(
    ("input", "messages"),
    [
        ("Hi <|im_end|>", [item("user", "Hi <|im_end|>")]),
        ([item("user", [{"type": "input_text", "text": "Hi"}])], [item("user", "Hi")]),
        ([item("user", "Hi", type="message", status="completed")], [item("user", "Hi")]),
        (
            [item("developer", "Be"), item("user", "Hi"), ANSWERED, item("user", "So")],
            [
                item("system", "Be"),
                item("user", "Hi"),
                item("assistant", "Yes?"),
                item("user", "So"),
            ],
        ),
    ],
)
async def test_the_prompt_is_that_of_a_chat_with_the_same_messages(
    served: Served, model: str, input: Any, messages: list[dict[str, str]]
) -> None:
    await respond(served, model=model, input=input)
    prompt_ids = served.engine.requests[-1].prompt_ids
    assert prompt_ids == await chat_ids(served, model, messages)
    await respond(served, model=model, input=input, instructions="Be brief")
    prompt_ids = served.engine.requests[-1].prompt_ids
    assert prompt_ids == await chat_ids(served, model, [item("system", "Be brief"), *messages])


async def test_an_answer_can_be_sent_back_as_the_client_got_it(served: Served) -> None:
    talk: list[Any] = [item("user", "Hi")]
    answer = await respond(served, input=talk)
    talk += [each.to_dict() for each in answer.output]
    talk.append(item("user", "So"))
    assert (await respond(served, input=talk)).output_text == "one two"


async def test_a_stream_has_openais_events_in_their_order_and_numbers(served: Served) -> None:
    events = [each async for each in await respond(served, stream=True, temperature=0)]
    delta = "response.output_text.delta"
    kinds = [*OPENING, delta, delta, *CLOSING, "response.completed"]
    assert [each.type for each in events] == kinds
    assert [each.sequence_number for each in events] == list(range(len(kinds)))
    assert [each.delta for each in events if each.type == delta] == ["one", " two"]
    created, last = events[0].response, events[-1].response
    assert (created.status, created.output, created.usage) == ("in_progress", [], None)
    whole = await respond(served, temperature=0)
    ignored = {"id", "created_at", "output"}
    assert last.model_dump(exclude=ignored) == whole.model_dump(exclude=ignored)
    assert last.output_text == whole.output_text
    assert {each.item_id for each in events if hasattr(each, "item_id")} == {last.output[0].id}


async def test_openais_stream_helper_accumulates_the_response(served: Served) -> None:
    async with openai_client(served).responses.stream(**GOOD) as stream:
        events = [each async for each in stream]
        final = await stream.get_final_response()
    assert final.output_text == "one two"
    assert events[-1].type == "response.completed"


async def test_each_event_is_named_by_its_type(served: Served) -> None:
    response = await served.client.post("/v1/responses", json={**GOOD, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    for text in response.text.strip().split("\n\n"):
        name, data = text.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


async def test_log_probabilities_come_where_they_are_included(served: Served) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer = await respond(served, **asked)
    first = answer.output[0].content[0].logprobs[0]
    assert (first.token, first.logprob) == (tiny.tokenizer().decode([5]), -0.5)
    assert bytes(first.bytes).decode() == first.token
    assert [each.logprob for each in first.top_logprobs] == [0.0]
    events = [each async for each in await respond(served, stream=True, **asked)]
    deltas = [each for each in events if each.type == "response.output_text.delta"]
    assert [each.logprobs[0].logprob for each in deltas] == [-0.5, -0.25]
    assert not (await respond(served)).output[0].content[0].logprobs


async def test_tokens_are_chosen_as_on_the_other_routes(served: Served) -> None:
    body = {"stop": ["x"], "ignore_eos": True, "top_k": 3, "repetition_penalty": 1.5, "seed": 4}
    body |= {"structured_outputs": {"choice": ["a"]}, "logit_bias": {"5": -1.5}, "min_tokens": 2}
    response = await served.client.post(
        "/v1/responses", json={**GOOD, "max_output_tokens": 9, **body}
    )
    assert response.status_code == 200, response.text
    of_response = served.engine.requests[-1].sampling
    chat = {"model": "base", "messages": [item("user", "Hi")], "max_tokens": 9, **body}
    assert (await served.client.post("/v1/chat/completions", json=chat)).status_code == 200
    assert of_response == served.engine.requests[-1].sampling


async def test_a_failure_in_a_stream_is_openais_error_and_a_failed_response(
    served: Served,
) -> None:
    served.engine.ending = (FinishReason.ABORT, "unloaded")
    events = [each async for each in await respond(served, stream=True)]
    error, failed = events[-2:]
    assert (error.type, error.code) == ("error", "adapter_unloaded")
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert "unloaded" in failed.response.error.message
    with pytest.raises(openai.APIStatusError, match="unloaded"):
        await respond(served)


async def test_neutral_values_are_accepted_and_change_nothing(served: Served) -> None:
    neutral = {
        "store": False,
        "background": False,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "max_tool_calls": 3,
        "truncation": "disabled",
        "service_tier": "auto",
        "reasoning": {"effort": None},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "include": ["reasoning.encrypted_content"],
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "me",
        "prompt_cache_retention": "24h",
        "instructions": None,
        "max_output_tokens": None,
        "temperature": None,
        "metadata": None,
        "previous_response_id": None,
        "conversation": None,
        "prompt": None,
        "moderation": None,
        "stream_options": None,
    }
    await respond(served, temperature=0)
    plain = served.engine.requests[-1]
    assert (await respond(served, **{**neutral, "temperature": 0})).output_text == "one two"
    assert served.engine.requests[-1].sampling == plain.sampling
    assert served.engine.requests[-1].prompt_ids == plain.prompt_ids


@pytest.mark.parametrize(("field", "value", "name"), REFUSED)
async def test_what_cannot_be_honoured_is_refused_by_name(
    served: Served, field: str, value: Any, name: str
) -> None:
    body = {**GOOD, field: value}
    error = await refused(served, 422, "invalid_field", path="/v1/responses", json=body)
    assert error["param"] == name
    assert name in error["message"]


async def test_a_prompt_that_the_model_cannot_take_is_an_error_of_the_input(served: Served) -> None:
    served.engine.max_length = 20
    body = {**GOOD, "input": "x" * 50}
    response = await served.client.post("/v1/responses", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input"
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_responses_need_a_key_where_generating_does(serve: Serve) -> None:
    served = await serve(api_keys="user")
    assert (await served.client.post("/v1/responses", json=GOOD)).status_code == 401
