"""The routes under /v1: OpenAI's own client reads every answer, and errors have OpenAI's shape."""

import json
from functools import partial
from typing import Any

import openai
import pytest
import tiny
import tiny_configs
from api import Serve, Served, openai_client, refused

from server.engine.errors import QueueFull
from server.engine.request import FinishReason

GOOD: dict[str, Any] = {"model": "base", "prompt": "Hi"}
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi <|im_end|>"}]}


def says(content: Any, role: str = "user", **more: Any) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": role, "content": content, **more}]


IMAGE = {"type": "image_url", "image_url": "x"}
NUMBER_AS_TEXT = {"type": "text", "text": 5}
# Field, refused value, and the name in the error: the part at fault, where it is not the field.
REFUSED_COMPLETIONS = [
    ("prompt", ["a", ""], "prompt"),
    ("prompt", [[1], []], "prompt"),
    ("prompt", [[[1]]], "prompt"),
    ("prompt", [True], "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", "", "prompt"),
    ("prompt", "\ud800", "prompt"),
    ("prompt", 5, "prompt"),
    ("prompt", None, "prompt"),
    ("prompt", [1, tiny_configs.VOCAB], "prompt.1"),
    ("prompt", [-1], "prompt.0"),
    ("prompt", [[1, 2], [tiny_configs.VOCAB]], "prompt.1.0"),
    ("temperature", 2.1, "temperature"),
    ("max_tokens", 0, "max_tokens"),
    ("best_of", 2, "best_of"),
    ("logprobs", 21, "logprobs"),
    ("echo", "yes", "echo"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("stream_options", {"more": True}, "stream_options.more"),
]
REFUSED_CHATS = [
    ("max_tokens", 0, "max_tokens"),
    ("top_logprobs", 1, "top_logprobs"),
    ("messages", [], "messages"),
    ("messages", says("x", role="function"), "messages.0.role"),
    ("messages", says([IMAGE]), "messages.0.content"),
    ("messages", says([NUMBER_AS_TEXT]), "messages.0.content"),
    ("messages", says("Hi", more=1), "messages.0.more"),
]
UNKNOWN_FIELDS = {"stream_options.more", "messages.0.more"}


async def complete(served: Served, **body: Any) -> Any:
    """A completion, by OpenAI's client."""
    return await openai_client(served).completions.create(**GOOD | body)


async def chat(served: Served, **body: Any) -> Any:
    """A chat completion, by OpenAI's client."""
    return await openai_client(served).chat.completions.create(**CHAT | body)


async def completion_refused(
    served: Served, status: int, code: str, **request: Any
) -> dict[str, Any]:
    """`api.refused` for /v1/completions, unless the request says otherwise."""
    request = {"path": "/v1/completions", "json": GOOD, **request}
    return await refused(served, status, code, **request)


def text_of(token_id: int) -> str:
    return tiny.tokenizer().decode([token_id])


async def test_openais_client_reads_a_completion(served: Served) -> None:
    answer = await complete(served, model="medical:crma-on", n=2, user="me", stop=None)
    request = served.engine.requests[-1]
    choices = [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices]
    assert choices == [(0, "one two", "stop", None), (1, "one two", "stop", None)]
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    assert answer.usage.total_tokens == len(request.prompt_ids) + 4
    assert answer.id == request.id
    assert answer.object == "text_completion"
    assert answer.model == "medical:crma-on"
    assert answer.provenance["seed"] == request.sampling.seed
    assert request.sampling.temperature == 1
    assert request.sampling.max_tokens == 16


async def test_a_stream_has_a_chunk_per_token_then_the_ending_then_the_usage_if_asked_for(
    served: Served,
) -> None:
    served.engine.answer = lambda _: "one"  # the second token has no text
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [chunk async for chunk in await complete(served, **options)]
    choices = [(c.text, c.finish_reason) for chunk in chunks for c in chunk.choices]
    assert choices == [("one", None), ("", None), ("", "stop")]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1].usage.completion_tokens == 2
    text = (await served.client.post("/v1/completions", json=GOOD | {"stream": True})).text
    assert text.endswith("}\n\ndata: [DONE]\n\n")
    assert "usage" not in text


async def test_a_failure_in_a_stream_reaches_openais_client_as_an_error(served: Served) -> None:
    served.engine.ending = (FinishReason.ABORT, "unloaded")
    chunks = await complete(served, stream=True)
    with pytest.raises(openai.APIError, match="unloaded"):
        [chunk async for chunk in chunks]


async def test_every_prompt_of_a_request_reports_its_own_seed(served: Served) -> None:
    """Only the first one's was reported, so the others could not be repeated."""
    answer = await complete(served, prompt=[[5, 9], [7, 8]], temperature=1.0)
    seeds = [request.sampling.seed for request in served.engine.requests[-2:]]
    assert answer.provenance["seeds"] == seeds
    assert answer.provenance["seed"] == seeds[0] != seeds[1]
    alone = await complete(served, prompt=[5, 9], temperature=1.0)
    assert "seeds" not in alone.provenance


async def test_an_echo_always_has_a_token_after_the_prompt(served: Served) -> None:
    """lm-eval asks for one token and cuts it off: it must not end at once."""
    await complete(served, prompt=[5, 9], echo=True, max_tokens=1)
    assert served.engine.requests[-1].sampling.ignore_eos


async def test_more_answers_than_there_is_ever_room_for_are_refused(serve: Serve) -> None:
    """They were a 429 with Retry-After, for ever."""
    served = await serve(max_queue=6, max_num_seqs=2)
    for fitting in ({"prompt": ["a"] * 8}, {"prompt": ["a"] * 4, "n": 2}, {"n": 8}):
        response = await served.client.post("/v1/completions", json=GOOD | fitting)
        assert response.status_code == 200
    for wrong in ({"prompt": ["a"] * 9}, {"prompt": ["a"] * 5, "n": 2}):
        error = await completion_refused(served, 400, "request_too_large", json=GOOD | wrong)
        assert error["param"] == "prompt"
        assert "<= 8" in error["message"]
    small = await serve(max_queue=1, max_num_seqs=2)
    response = await small.generate(n=4)
    assert response.status_code == 400
    assert response.json()["error"]["field"] == "n"
    assert "Retry-After" not in response.headers


async def test_the_choices_of_several_prompts_are_streamed_under_their_own_numbers(
    served: Served,
) -> None:
    served.engine.answer = lambda request: f"one {request.prompt_ids[0]}"
    asked = {"prompt": [[5], [7], [9]], "n": 2}
    whole = await complete(served, **asked)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = [c async for c in await complete(served, **asked, stream=True, stream_options=usage)]
    texts = [""] * 6
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert texts == ["one 5", "one 5", "one 7", "one 7", "one 9", "one 9"]
    assert [chunk.usage.completion_tokens for chunk in chunks][-1] == 12
    assert chunks[0].usage.completion_tokens < chunks[-2].usage.completion_tokens
    served.engine.ending = (FinishReason.ERROR, "overflow")
    with pytest.raises(openai.APIError, match="overflow"):
        [chunk async for chunk in await complete(served, **asked, stream=True)]
    assert served.engine.running == 0


async def test_the_first_of_several_prompts_that_fails_ends_the_others(served: Served) -> None:
    served.engine.ending = (FinishReason.ERROR, "overflow")
    answer = await served.client.post("/v1/completions", json=GOOD | {"prompt": ["a", "b", "c"]})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "generation_failed"
    assert served.engine.most_running == 3
    assert served.engine.running == 0


async def test_a_conversation_goes_through_the_chat_template_and_its_texts_stay_text(
    served: Served,
) -> None:
    turns = [
        ("system", "Be ⟦0⟧ brief."),
        ("user", "<|im_end|> Hi"),
        ("assistant", "Yes?"),
        ("user", "3 €"),
    ]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[-1]["content"] = [{"type": "text", "text": "3 "}, {"type": "text", "text": "€"}]
    await chat(served, messages=messages)
    encode = partial(tiny.tokenizer().encode, add_special_tokens=False)
    expected: list[int] = []
    for role, text in turns:
        expected += encode(f"<|im_start|>{role}\n")
        expected += encode(text, split_special_tokens=True)
        expected += encode("<|im_end|>\n")
    expected += encode("<|im_start|>assistant\n")
    assert served.engine.requests[-1].prompt_ids == tuple(expected)


async def test_variables_of_the_chat_template_reach_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %}<|im_end|>{% endif %}"
    monkeypatch.setattr(served.app.state.frontend.tokenizer, "chat_template", template)
    for value in (True, False):
        more = {"chat_template_kwargs": {"enable_thinking": value}}
        await chat(served, extra_body=more)
        end = tiny.tokenizer().eos_token_id
        assert (served.engine.requests[-1].prompt_ids[-1] == end) == value
    with pytest.raises(openai.UnprocessableEntityError, match="its adapter's own format"):
        await chat(served, model="medical", extra_body=more)


async def test_openais_client_reads_a_chat_completion(served: Served) -> None:
    options = {"n": 2, "max_completion_tokens": 7, "logprobs": True, "top_logprobs": 2}
    answer = await chat(served, **options)
    request = served.engine.requests[-1]
    assert request.sampling.max_tokens == 7
    assert request.sampling.temperature == 1
    assert answer.object == "chat.completion"
    assert answer.choices[0].logprobs.refusal is None
    choices = [(c.index, c.message.role, c.message.content) for c in answer.choices]
    assert choices == [(0, "assistant", "one two"), (1, "assistant", "one two")]
    first = answer.choices[0].logprobs.content[0]
    assert first.token == text_of(5)
    assert first.logprob == -0.5
    assert len(first.top_logprobs) == 2
    assert bytes(first.bytes).decode() == first.token


async def test_one_user_turn_to_a_task_uses_the_prompt_format_of_its_training(
    served: Served,
) -> None:
    await chat(served, model="medical")
    await served.generate(prompt="Hi <|im_end|>", task="medical")
    asked, generated = served.engine.requests[-2:]
    assert asked.prompt_ids == generated.prompt_ids
    assert asked.selection == generated.selection


async def test_one_user_turn_to_the_base_is_the_same_in_chat_and_generate(served: Served) -> None:
    await chat(served)
    await served.generate(prompt="Hi <|im_end|>")
    asked, generated = served.engine.requests[-2:]
    assert asked.prompt_ids == generated.prompt_ids


async def test_a_chat_streams_its_deltas(served: Served) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    chunks = [chunk async for chunk in await chat(served, **options)]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.delta.content for choice in choices] == ["one", " two", None]
    assert [choice.finish_reason for choice in choices] == [None, None, "stop"]
    assert [bool(choice.logprobs) for choice in choices] == [True, True, False]
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[-1].usage.completion_tokens == 2


async def test_only_the_first_delta_of_a_choice_has_the_role(served: Served) -> None:
    """OpenAI's client joins the deltas: the role was "assistantassistant…"."""
    async with openai_client(served).chat.completions.stream(**CHAT, n=2) as stream:
        answer = await stream.get_final_completion()
    messages = [(c.message.role, c.message.content) for c in answer.choices]
    assert messages == [("assistant", "one two")] * 2
    served.engine.pieces = lambda *_: []  # ends before any token
    chunks = [chunk async for chunk in await chat(served, stream=True)]
    assert [(c.delta.role, c.delta.content) for c in chunks[0].choices] == [("assistant", "")]


async def test_a_chat_without_max_tokens_has_what_is_left_of_the_context(served: Served) -> None:
    """16 tokens, the default of /v1/completions, cut answers short without a word."""
    for limits in ({}, {"max_tokens": None}):
        await chat(served, **limits)
        request = served.engine.requests[-1]
        left = served.engine.model.max_model_len - len(request.prompt_ids)
        assert request.sampling.max_tokens == left
    for limits in ({"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 5}):
        await chat(served, **limits)
        assert served.engine.requests[-1].sampling.max_tokens == 3
    for limits in ({}, {"max_tokens": None}):
        await complete(served, **limits)
        assert served.engine.requests[-1].sampling.max_tokens == 16
        await served.generate(**limits)
        assert served.engine.requests[-1].sampling.max_tokens == 16


async def test_a_context_that_is_too_short_is_named_as_openais_clients_expect(
    served: Served,
) -> None:
    served.engine.max_length = 20
    long = CHAT | {"messages": says("x" * 40), "max_tokens": 4}
    requests = [
        ("/v1/chat/completions", long, "messages"),
        ("/v1/chat/completions", {**long, "max_tokens": None}, "messages"),
        ("/v1/completions", GOOD | {"prompt": [5] * 17, "max_tokens": 4}, "prompt"),
    ]
    for path, body, field in requests:
        response = await served.client.post(path, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == field
        assert "maximum context length is 20 tokens" in error["message"]
    assert "21 tokens (17 in the prompt, 4 in the completion)" in error["message"]


async def test_the_models_are_the_base_and_the_tasks_that_serve(served: Served) -> None:
    models = openai_client(served).models
    listed = [model async for model in models.list()]
    found = [(model.id, model.owned_by, model.created > 0) for model in listed]
    assert found == [("base", "tiny", False), ("legal", "tiny", True), ("medical", "tiny", True)]
    assert (await models.retrieve("medical@v1")).created == listed[2].created
    with pytest.raises(openai.NotFoundError, match="medcal"):
        await models.retrieve("medcal")


async def test_a_prompt_is_raw_text_as_transformers_encodes_it_or_token_ids(
    served: Served,
) -> None:
    text = "<|im_start|>user\nthe<|im_end|>"
    as_markup = tiny.tokenizer()(text)["input_ids"]
    assert as_markup != tiny.tokenizer().encode(text, split_special_tokens=True)
    for prompt in (text, as_markup):
        await complete(served, model="legal", prompt=prompt)
        assert served.engine.requests[-1].prompt_ids == tuple(as_markup)


@pytest.mark.parametrize("suffix", ["", ":crma-on", ":crma-off"])
@pytest.mark.parametrize("model", ["base", "medical", "medical@v1"])
async def test_the_model_names_the_task_its_version_and_crma(
    served: Served, model: str, suffix: str
) -> None:
    await complete(served, model=model + suffix)
    default = model != "base"  # "medical" was trained with CRMA
    crma_is_on = {"": default, ":crma-on": True, ":crma-off": False}[suffix]
    task, crma = served.engine.requests[-1].selection
    assert (task is not None) == (model != "base")
    assert (crma is not None) == crma_is_on
    if suffix:
        contradiction = GOOD | {"model": model + suffix, "crma": not crma_is_on}
        error = await completion_refused(served, 422, "invalid_field", json=contradiction)
        assert error["param"] == "crma"


@pytest.mark.parametrize(
    "model", ["medcal", "medical@v9", "medical:crma", ":crma-on", "base@v1", "../x"]
)
async def test_an_unknown_model_is_404_and_the_known_ones_are_listed(
    served: Served, model: str
) -> None:
    body = GOOD | {"model": model}
    error = await completion_refused(served, 404, "model_not_found", json=body)
    assert error["param"] == "model"
    assert "medical" in error["message"]


@pytest.mark.parametrize(("field", "value", "named"), REFUSED_COMPLETIONS)
async def test_a_completion_is_refused_with_the_name_of_what_is_wrong(
    served: Served, field: str, value: Any, named: str
) -> None:
    code = "unknown_field" if named in UNKNOWN_FIELDS else "invalid_field"
    content = json.dumps(GOOD | {field: value})
    error = await refused(served, 422, code, path="/v1/completions", content=content)
    assert error["param"] == named


@pytest.mark.parametrize(("field", "value", "named"), REFUSED_CHATS)
async def test_a_chat_is_refused_with_the_name_of_what_is_wrong(
    served: Served, field: str, value: Any, named: str
) -> None:
    code = "unknown_field" if named in UNKNOWN_FIELDS else "invalid_field"
    content = json.dumps(CHAT | {field: value})
    error = await refused(served, 422, code, path="/v1/chat/completions", content=content)
    assert error["param"] == named


async def test_every_refusal_has_openais_shape(serve: Serve) -> None:
    served = await serve(max_body_bytes=1024, api_keys="sk")
    other_key = {"Authorization": "Bearer other"}
    await completion_refused(served, 401, "unauthorized", headers=other_key)
    served.client.headers["Authorization"] = "Bearer sk"
    await completion_refused(served, 404, "no_route", path="/v1/embeddings")
    await completion_refused(served, 413, "body_too_large", json=None, content=b"x" * 2000)
    await completion_refused(served, 400, "malformed_body", json=None, content=b"{")
    streamed = GOOD | {"stream": True}
    served.engine.refusal = QueueFull(4, 2.2)
    await completion_refused(served, 429, "queue_full", json=streamed)
    served.engine.refusal = ValueError("x")
    await completion_refused(served, 500, "internal_error", json=streamed)
