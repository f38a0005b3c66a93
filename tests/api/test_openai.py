"""POST /v1/completions, read by OpenAI's own client; and that every refusal under /v1 is in OpenAI's shape."""

import json
from typing import Any

import httpx2
import openai
import pytest
import tiny

from server.engine.errors import QueueFull
from server.engine.request import FinishReason

from .conftest import Serve, Served
from .test_errors import refused

GOOD: dict[str, Any] = {"model": "base", "prompt": "Hi"}
# Field, value, and how it is named where that is more exact.
REFUSED = [*(("prompt", value, "") for value in (["a", "b"], [[1]], [True], [], "", "\ud800", 5, None))]
REFUSED += [("prompt", [1, tiny.VOCAB], "prompt.1"), ("prompt", [-1], "prompt.0"), ("temperature", 2.1, "")]
REFUSED += [(name, 1, "") for name in ("echo", "logprobs", "best_of", "suffix", "logit_bias", "top_k")]
REFUSED += [("stream_options", {"include_usage": True}, ""), ("stream_options", {"more": True}, "stream_options.more")]


def create(served: Served, **body: Any) -> Any:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(served.app))
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="sk", max_retries=0, http_client=http)
    return client.completions.create(**GOOD | body)


async def complete(served: Served, status: int, code: str, **request: Any) -> dict[str, Any]:
    return await refused(served, status, code, **{"path": "/v1/completions", "json": GOOD, **request})


async def test_openais_client_reads_an_answer(served: Served) -> None:
    answer = await create(served, model="medical:crma-on", n=2, user="me", stop=None)
    request, prompt = served.engine.requests[-1], answer.usage.prompt_tokens
    choices = [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices]
    assert choices == [(i, "one two", "stop", None) for i in range(2)]
    assert (len(request.prompt_ids), answer.usage.total_tokens) == (prompt, prompt + 4)
    assert (answer.id, answer.object, answer.model) == (request.id, "text_completion", "medical:crma-on")
    assert answer.provenance["seed"] == request.sampling.seed
    assert (request.sampling.temperature, request.sampling.max_tokens) == (1, 16)


async def test_a_stream_is_a_chunk_a_token_an_end_and_the_usage_if_asked_for(served: Served) -> None:
    served.engine.answer = lambda _: "one"  # of the second token nothing is shown
    chunks = [chunk async for chunk in await create(served, stream=True, stream_options={"include_usage": True})]
    choices = [(c.text, c.finish_reason) for chunk in chunks for c in chunk.choices]
    assert choices == [("one", None), ("", None), ("", "stop")]
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in chunks] == [None, None, None, 2]
    text = (await served.client.post("/v1/completions", json=GOOD | {"stream": True})).text
    assert (text.endswith("}\n\ndata: [DONE]\n\n"), "usage" in text) == (True, False)
    served.engine.ending = (FinishReason.ABORT, "unloaded")
    with pytest.raises(openai.APIError, match="unloaded"):
        [chunk async for chunk in await create(served, stream=True)]


async def test_a_prompt_is_raw_text_or_token_ids(served: Served) -> None:
    for ids in (True, False):
        tokens = tiny.tokenizer().encode("<|im_end|>", split_special_tokens=not ids)
        await create(served, model="legal", prompt=tokens if ids else "<|im_end|>")
        assert served.engine.requests[-1].prompt_ids == tuple(tokens)


@pytest.mark.parametrize("suffix", ["", ":crma-on", ":crma-off"])
@pytest.mark.parametrize("model", ["base", "medical", "medical@v1"])
async def test_the_model_names_the_task_its_version_and_crma(served: Served, model: str, suffix: str) -> None:
    await create(served, model=model + suffix)
    on = suffix == ":crma-on" or (not suffix and model != "base")
    task, crma = served.engine.requests[-1].selection
    assert (task is not None, crma is not None) == (model != "base", on)
    if suffix:
        error = await complete(served, 422, "invalid_field", json=GOOD | {"model": model + suffix, "crma": not on})
        assert error["param"] == "crma"


@pytest.mark.parametrize("model", ["medcal", "medical@v9", "medical:crma", ":crma-on", "base@v1", "../x"])
async def test_an_unknown_model_is_404_with_what_there_is(served: Served, model: str) -> None:
    error = await complete(served, 404, "model_not_found", json=GOOD | {"model": model})
    assert (error["param"], "medical" in error["message"]) == ("model", True)


@pytest.mark.parametrize(("field", "value", "named"), REFUSED)
async def test_what_is_not_honoured_is_refused_by_name(served: Served, field: str, value: Any, named: str) -> None:
    code = "unknown_field" if value == 1 or "more" in named else "invalid_field"
    error = await complete(served, 422, code, content=json.dumps(GOOD | {field: value}), json=None)
    assert error["param"] == (named or field)


async def test_every_refusal_is_in_openais_shape(serve: Serve) -> None:
    served = await serve(max_body_bytes=1024, api_keys="sk")
    await complete(served, 401, "unauthorized", headers={"Authorization": "Bearer other"})
    served.client.headers["Authorization"] = "Bearer sk"
    await complete(served, 404, "no_route", path="/v1/chat/completions")
    await complete(served, 413, "body_too_large", json=None, content=b"x" * 2000)
    await complete(served, 400, "malformed_body", json=None, content=b"{")
    for refusal, status, code in ((QueueFull(4, 2.2), 429, "queue_full"), (ValueError("x"), 500, "internal_error")):
        served.engine.refusal = refusal
        await complete(served, status, code, json=GOOD | {"stream": True})
