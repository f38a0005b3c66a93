"""The routes under /v1: OpenAI's own client reads every answer, and errors have OpenAI's shape."""

import json
from functools import partial
from typing import Any

import httpx2
import openai
import pytest
import tiny
from api import Serve, Served, refused

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
    ("prompt", [1, tiny.VOCAB], "prompt.1"),
    ("prompt", [-1], "prompt.0"),
    ("temperature", 2.1, "temperature"),
    ("best_of", 1, "best_of"),
    ("suffix", 1, "suffix"),
    ("logit_bias", 1, "logit_bias"),
    ("top_k", 1, "top_k"),
    ("response_format", 1, "response_format"),
    ("logprobs", 21, "logprobs"),
    ("echo", "yes", "echo"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("stream_options", {"more": True}, "stream_options.more"),
]
REFUSED_CHATS = [
    ("tools", [], "tools"),
    ("response_format", {}, "response_format"),
    ("top_logprobs", 1, "top_logprobs"),
    ("messages", [], "messages"),
    ("messages", says("x", role="tool"), "messages.0.role"),
    ("messages", says([IMAGE]), "messages.0.content"),
    ("messages", says([NUMBER_AS_TEXT]), "messages.0.content"),
    ("messages", says("Hi", tool_calls=[]), "messages.0.tool_calls"),
]
UNKNOWN_FIELDS = {
    "best_of",
    "suffix",
    "logit_bias",
    "top_k",
    "response_format",
    "stream_options.more",
    "tools",
    "messages.0.tool_calls",
}


def openai_client(served: Served) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(served.app))
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="sk", max_retries=0, http_client=http
    )


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


async def test_prompts_are_echoed_with_the_log_probabilities_of_their_tokens(
    served: Served,
) -> None:
    answer = await complete(served, prompt=[[5, 9, 40], [7, 8]], echo=True, logprobs=1, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [len(each.prompt_ids) for each in served.engine.requests[-2:]] == [3, 2]
    assert answer.usage.prompt_tokens == 5
    first, second = [5, 9, 40, 5, 6], [7, 8, 5, 6]  # prompt and answer
    most_probable = {text_of(0): 0.0}
    for choice, ids in zip(answer.choices, [first, first, second, second], strict=True):
        texts = [text_of(token_id) for token_id in ids]
        assert choice.logprobs.tokens == texts
        assert choice.text == "".join(texts[:-2]) + "one two"
        assert choice.logprobs.token_logprobs == [None, *[-1.0] * (len(ids) - 3), -0.5, -0.25]
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.top_logprobs[1:] == [most_probable] * (len(ids) - 1)
        assert choice.logprobs.text_offset[-1] == len("".join(texts[:-1]))


async def test_a_stream_brings_the_log_probability_of_each_token(served: Served) -> None:
    chunks = [chunk async for chunk in await complete(served, logprobs=0, stream=True)]
    first, second, last = [choice.logprobs for chunk in chunks for choice in chunk.choices]
    assert (first.token_logprobs, second.token_logprobs, last) == ([-0.5], [-0.25], None)
    assert first.top_logprobs == [{}], "an object, as OpenAI's clients read it, not a list"


async def test_an_echo_always_has_a_token_after_the_prompt(served: Served) -> None:
    """lm-eval asks for one token and cuts it off: it must not end at once."""
    await complete(served, prompt=[5, 9], echo=True, max_tokens=1)
    assert served.engine.requests[-1].sampling.ignore_eos


async def test_too_many_prompts_are_refused_and_only_one_can_be_streamed(served: Served) -> None:
    many = GOOD | {"prompt": ["a"] * 257}
    error = await completion_refused(served, 422, "invalid_field", json=many)
    assert error["param"] == "prompt"
    for wrong in ({"echo": True}, {"prompt": ["a", "b"]}):
        body = GOOD | {"stream": True} | wrong
        error = await completion_refused(served, 422, "invalid_field", json=body)
        assert error["param"] == "stream"


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


async def test_openais_client_reads_a_chat_completion(served: Served) -> None:
    options = {"n": 2, "max_completion_tokens": 7, "logprobs": True, "top_logprobs": 2}
    answer = await chat(served, **options)
    request = served.engine.requests[-1]
    assert request.sampling.max_tokens == 7
    assert request.sampling.temperature == 1
    assert answer.object == "chat.completion"
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
    await chat(served)  # the base uses the model's own chat template
    assert served.engine.requests[-1].prompt_ids != asked.prompt_ids


async def test_a_chat_streams_its_deltas(served: Served) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    chunks = [chunk async for chunk in await chat(served, **options)]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.delta.content for choice in choices] == ["one", " two", None]
    assert [choice.finish_reason for choice in choices] == [None, None, "stop"]
    assert [bool(choice.logprobs) for choice in choices] == [True, True, False]
    assert choices[0].delta.role == "assistant"
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[-1].usage.completion_tokens == 2


async def test_the_models_are_the_base_and_the_tasks_that_serve(served: Served) -> None:
    models = openai_client(served).models
    listed = [model async for model in models.list()]
    found = [(model.id, model.owned_by, model.created > 0) for model in listed]
    assert found == [("base", "tiny", False), ("legal", "tiny", True), ("medical", "tiny", True)]
    assert (await models.retrieve("medical@v1")).created == listed[2].created
    with pytest.raises(openai.NotFoundError, match="medcal"):
        await models.retrieve("medcal")


async def test_a_prompt_is_raw_text_or_token_ids(served: Served) -> None:
    text = "<|im_end|>"
    as_text = tiny.tokenizer().encode(text, split_special_tokens=True)
    as_markup = tiny.tokenizer().encode(text, split_special_tokens=False)
    assert as_text != as_markup
    await complete(served, model="legal", prompt=text)
    assert served.engine.requests[-1].prompt_ids == tuple(as_text)
    await complete(served, model="legal", prompt=as_markup)
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
