"""The routes under /v1, read by OpenAI's own client; and that every refusal there is in OpenAI's
shape.
"""

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
    return [{"role": role, "content": content, **more}]


# Field, value, and how it is named where that is more exact.
REFUSED = [
    *(
        ("prompt", value, "")
        for value in (["a", ""], [[1], []], [[[1]]], [True], [], "", "\ud800", 5, None)
    )
]
REFUSED += [
    ("prompt", [1, tiny.VOCAB], "prompt.1"),
    ("prompt", [-1], "prompt.0"),
    ("temperature", 2.1, ""),
]
REFUSED += [
    (name, 1, "") for name in ("best_of", "suffix", "logit_bias", "top_k", "response_format")
]
REFUSED += [("logprobs", 21, ""), ("echo", "yes", "")]
REFUSED += [
    ("stream_options", {"include_usage": True}, ""),
    ("stream_options", {"more": True}, "stream_options.more"),
]
REFUSED_CHATS = [
    ("tools", [], ""),
    ("response_format", {}, ""),
    ("top_logprobs", 1, ""),
    ("messages", [], ""),
]
REFUSED_CHATS += [("messages", says("x", role="tool"), "messages.0.role")]
REFUSED_CHATS += [
    ("messages", says([{"type": "image_url", "image_url": "x"}]), "messages.0.content")
]
REFUSED_CHATS += [("messages", says([{"type": "text", "text": 5}]), "messages.0.content")]
REFUSED_CHATS += [("messages", says("Hi", tool_calls=[]), "messages.0.tool_calls")]
UNKNOWN = {"best_of", "suffix", "logit_bias", "top_k", "response_format", "stream_options.more"}
UNKNOWN |= {"tools", "messages.0.tool_calls"}


def openais(served: Served) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(served.app))
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="sk", max_retries=0, http_client=http
    )


def create(served: Served, **body: Any) -> Any:
    return openais(served).completions.create(**GOOD | body)


def chat(served: Served, **body: Any) -> Any:
    return openais(served).chat.completions.create(**CHAT | body)


async def complete(served: Served, status: int, code: str, **request: Any) -> dict[str, Any]:
    return await refused(
        served, status, code, **{"path": "/v1/completions", "json": GOOD, **request}
    )


async def test_openais_client_reads_an_answer(served: Served) -> None:
    answer = await create(served, model="medical:crma-on", n=2, user="me", stop=None)
    request, prompt = served.engine.requests[-1], answer.usage.prompt_tokens
    choices = [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices]
    assert choices == [(i, "one two", "stop", None) for i in range(2)]
    assert (len(request.prompt_ids), answer.usage.total_tokens) == (prompt, prompt + 4)
    assert (answer.id, answer.object, answer.model) == (
        request.id,
        "text_completion",
        "medical:crma-on",
    )
    assert answer.provenance["seed"] == request.sampling.seed
    assert (request.sampling.temperature, request.sampling.max_tokens) == (1, 16)


async def test_a_stream_is_a_chunk_a_token_an_end_and_the_usage_if_asked_for(
    served: Served,
) -> None:
    served.engine.answer = lambda _: "one"  # of the second token nothing is shown
    chunks = [
        chunk
        async for chunk in await create(served, stream=True, stream_options={"include_usage": True})
    ]
    choices = [(c.text, c.finish_reason) for chunk in chunks for c in chunk.choices]
    assert choices == [("one", None), ("", None), ("", "stop")]
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in chunks] == [
        None,
        None,
        None,
        2,
    ]
    text = (await served.client.post("/v1/completions", json=GOOD | {"stream": True})).text
    assert (text.endswith("}\n\ndata: [DONE]\n\n"), "usage" in text) == (True, False)
    served.engine.ending = (FinishReason.ABORT, "unloaded")
    with pytest.raises(openai.APIError, match="unloaded"):
        [chunk async for chunk in await create(served, stream=True)]


async def test_prompts_are_echoed_with_the_log_probabilities_of_their_tokens(
    served: Served,
) -> None:
    answer = await create(served, prompt=[[5, 9, 40], [7, 8]], echo=True, logprobs=1, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [len(each.prompt_ids) for each in served.engine.requests[-2:]] == [3, 2]
    assert answer.usage.prompt_tokens == 5
    for choice, ids in zip(
        answer.choices, [[5, 9, 40, 5, 6]] * 2 + [[7, 8, 5, 6]] * 2, strict=True
    ):
        texts = [tiny.tokenizer().decode([each]) for each in ids]
        assert choice.logprobs.tokens == texts
        assert choice.text == "".join(texts[:-2]) + "one two"
        assert choice.logprobs.token_logprobs == [None, *[-1.0] * (len(ids) - 3), -0.5, -0.25]
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.top_logprobs[1:] == [{tiny.tokenizer().decode([0]): 0.0}] * (
            len(ids) - 1
        )
        assert choice.logprobs.text_offset[-1] == len("".join(texts[:-1]))
    chunks = [chunk async for chunk in await create(served, logprobs=0, stream=True)]
    logprobs = [c.logprobs and c.logprobs.token_logprobs for chunk in chunks for c in chunk.choices]
    assert logprobs == [[-0.5], [-0.25], None]
    await create(
        served, prompt=[5, 9], echo=True, max_tokens=1
    )  # lm-eval cuts the token after the prompt off
    assert served.engine.requests[-1].sampling.ignore_eos
    assert (await complete(served, 422, "invalid_field", json=GOOD | {"prompt": ["a"] * 257}))[
        "param"
    ] == "prompt"
    for wrong in ({"echo": True}, {"prompt": ["a", "b"]}):
        error = await complete(served, 422, "invalid_field", json=GOOD | {"stream": True} | wrong)
        assert error["param"] == "stream"


async def test_the_first_of_several_prompts_to_fail_ends_the_others(served: Served) -> None:
    served.engine.ending = (FinishReason.ERROR, "overflow")
    answer = await served.client.post("/v1/completions", json=GOOD | {"prompt": ["a", "b", "c"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
    assert (served.engine.most_running, served.engine.running) == (3, 0)


async def test_a_conversation_goes_through_the_chat_template_and_stays_text(served: Served) -> None:
    turns = [
        ("system", "Be ⟦0⟧ brief."),
        ("user", "<|im_end|> Hi"),
        ("assistant", "Yes?"),
        ("user", "3 €"),
    ]
    parts = [{"type": "text", "text": "3 "}, {"type": "text", "text": "€"}]
    messages = [{"role": role, "content": text if text != "3 €" else parts} for role, text in turns]
    answer = await chat(
        served, messages=messages, n=2, max_completion_tokens=7, logprobs=True, top_logprobs=2
    )
    request, encode = (
        served.engine.requests[-1],
        partial(tiny.tokenizer().encode, add_special_tokens=False),
    )
    expected: list[int] = []
    for role, text in turns:
        expected += (
            encode(f"<|im_start|>{role}\n")
            + encode(text, split_special_tokens=True)
            + encode("<|im_end|>\n")
        )
    assert request.prompt_ids == (*expected, *encode("<|im_start|>assistant\n"))
    assert (request.sampling.max_tokens, request.sampling.temperature) == (7, 1)
    choices = [(c.index, c.message.role, c.message.content) for c in answer.choices]
    assert choices == [(i, "assistant", "one two") for i in range(2)]
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, len(first.top_logprobs)) == (
        tiny.tokenizer().decode([5]),
        -0.5,
        2,
    )
    assert bytes(first.bytes).decode() == first.token
    assert answer.object == "chat.completion"


async def test_one_user_turn_to_a_task_is_asked_as_it_was_trained(served: Served) -> None:
    await chat(served, model="medical")
    await served.generate(prompt="Hi <|im_end|>", task="medical")
    asked, generated = served.engine.requests[-2:]
    assert asked.prompt_ids == generated.prompt_ids
    assert asked.selection == generated.selection
    await chat(served)
    assert (
        served.engine.requests[-1].prompt_ids != asked.prompt_ids
    )  # "base" has the model's own template


async def test_a_chat_streams_its_deltas(served: Served) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    chunks = [chunk async for chunk in await chat(served, **options)]
    choices = [
        (c.delta.content, c.finish_reason, bool(c.logprobs))
        for chunk in chunks
        for c in chunk.choices
    ]
    assert choices == [("one", None, True), (" two", None, True), (None, "stop", False)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (chunks[0].object, chunks[-1].usage.completion_tokens) == ("chat.completion.chunk", 2)


async def test_the_models_are_the_base_and_the_tasks_that_serve(served: Served) -> None:
    listed = [each async for each in openais(served).models.list()]
    found = [(each.id, each.owned_by, each.created > 0) for each in listed]
    assert found == [("base", "tiny", False), ("legal", "tiny", True), ("medical", "tiny", True)]
    assert (await openais(served).models.retrieve("medical@v1")).created == listed[2].created
    with pytest.raises(openai.NotFoundError, match="medcal"):
        await openais(served).models.retrieve("medcal")


async def test_a_prompt_is_raw_text_or_token_ids(served: Served) -> None:
    for ids in (True, False):
        tokens = tiny.tokenizer().encode("<|im_end|>", split_special_tokens=not ids)
        await create(served, model="legal", prompt=tokens if ids else "<|im_end|>")
        assert served.engine.requests[-1].prompt_ids == tuple(tokens)


@pytest.mark.parametrize("suffix", ["", ":crma-on", ":crma-off"])
@pytest.mark.parametrize("model", ["base", "medical", "medical@v1"])
async def test_the_model_names_the_task_its_version_and_crma(
    served: Served, model: str, suffix: str
) -> None:
    await create(served, model=model + suffix)
    on = suffix == ":crma-on" or (not suffix and model != "base")
    task, crma = served.engine.requests[-1].selection
    assert (task is not None, crma is not None) == (model != "base", on)
    if suffix:
        error = await complete(
            served, 422, "invalid_field", json=GOOD | {"model": model + suffix, "crma": not on}
        )
        assert error["param"] == "crma"


@pytest.mark.parametrize(
    "model", ["medcal", "medical@v9", "medical:crma", ":crma-on", "base@v1", "../x"]
)
async def test_an_unknown_model_is_404_with_what_there_is(served: Served, model: str) -> None:
    error = await complete(served, 404, "model_not_found", json=GOOD | {"model": model})
    assert (error["param"], "medical" in error["message"]) == ("model", True)


@pytest.mark.parametrize(
    ("body", "field", "value", "named"),
    [(GOOD, *each) for each in REFUSED] + [(CHAT, *each) for each in REFUSED_CHATS],
)
async def test_what_is_not_honoured_is_refused_by_name(
    served: Served, body: Any, field: str, value: Any, named: str
) -> None:
    code = "unknown_field" if (named or field) in UNKNOWN else "invalid_field"
    path = "/v1/completions" if body is GOOD else "/v1/chat/completions"
    error = await complete(
        served, 422, code, path=path, content=json.dumps(body | {field: value}), json=None
    )
    assert error["param"] == (named or field)


async def test_every_refusal_is_in_openais_shape(serve: Serve) -> None:
    served = await serve(max_body_bytes=1024, api_keys="sk")
    await complete(served, 401, "unauthorized", headers={"Authorization": "Bearer other"})
    served.client.headers["Authorization"] = "Bearer sk"
    await complete(served, 404, "no_route", path="/v1/embeddings")
    await complete(served, 413, "body_too_large", json=None, content=b"x" * 2000)
    await complete(served, 400, "malformed_body", json=None, content=b"{")
    for refusal, status, code in (
        (QueueFull(4, 2.2), 429, "queue_full"),
        (ValueError("x"), 500, "internal_error"),
    ):
        served.engine.refusal = refusal
        await complete(served, status, code, json=GOOD | {"stream": True})
