"""POST /tokenize and /detokenize: as the generating routes encode, and as the tokenizer decodes."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import api_keys
import pytest
import tiny
import tiny_configs
from api import Serve, Served, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.http.body import EXAMPLES

MESSAGES = [{"role": "user", "content": "Hi <|im_end|> you"}]
TALK = [*MESSAGES, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "So"}]


async def tokenize(served: Served, **body: Any) -> dict[str, Any]:
    response = await served.client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("model", ["base", "medical", "medical@v1:crma-off"])
@pytest.mark.parametrize("messages", [MESSAGES, TALK])
async def test_messages_become_the_tokens_that_a_chat_has(
    served: Served, model: str, messages: list[dict[str, str]]
) -> None:
    body = {"model": model, "messages": messages}
    answer = await tokenize(served, **body)
    chat = await served.client.post("/v1/chat/completions", json=body)
    assert tuple(answer["tokens"]) == served.engine.requests[-1].prompt_ids
    assert answer["count"] == chat.json()["usage"]["prompt_tokens"] == len(answer["tokens"])
    assert answer["max_model_len"] == 128
    assert answer["token_strs"] is None


@pytest.mark.parametrize("prompt", ["Hi", "the naïve café 🙂", "<|im_start|>user\nHi", " "])
async def test_a_prompt_becomes_the_tokens_that_a_completion_has(
    served: Served, prompt: str
) -> None:
    answer = await tokenize(served, prompt=prompt, return_token_strs=True)
    await served.client.post("/v1/completions", json={"model": "base", "prompt": prompt})
    assert tuple(answer["tokens"]) == served.engine.requests[-1].prompt_ids
    assert answer["token_strs"] == tiny.tokenizer().convert_ids_to_tokens(answer["tokens"])
    example = EXAMPLES["/tokenize"]["answers"]["application/json"]["example"]
    assert list(answer) == list(example)


async def test_fields_at_their_neutral_value_change_nothing(served: Served) -> None:
    plain = await tokenize(served, messages=MESSAGES)
    neutral = {
        "model": None,
        "prompt": None,
        "add_special_tokens": False,
        "return_token_strs": False,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": [],
    }
    assert await tokenize(served, messages=MESSAGES, **neutral) == plain


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools"),
        ({"messages": []}, "messages"),
        ({}, "body"),
        ({"prompt": "Hi", "messages": MESSAGES}, "body"),
    ],
)
async def test_what_would_give_other_tokens_is_refused_by_name(
    served: Served, body: dict[str, Any], field: str
) -> None:
    error = await refused(served, 422, "invalid_field", path="/tokenize", json=body)
    assert error["field"] == field


async def test_an_unknown_model_is_refused_by_both(served: Served) -> None:
    for path, body in (("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [1]})):
        error = await refused(
            served, 404, "model_not_found", path=path, json={**body, "model": "medcal"}
        )
        assert "medical" in error["allowed"]


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=20))
async def test_tokens_of_a_text_become_that_text(served: Served, text: str) -> None:
    tokens = (await tokenize(served, prompt=text))["tokens"]
    response = await served.client.post("/detokenize", json={"tokens": tokens})
    assert response.json() == {"prompt": text}


async def test_special_tokens_are_shown_and_parts_of_a_character_too(served: Served) -> None:
    tokenizer = tiny.tokenizer()
    ids = [tokenizer.eos_token_id, *tokenizer.encode("🙂", add_special_tokens=False)[:-1]]
    body = (await served.client.post("/detokenize", json={"tokens": ids})).json()
    assert body["prompt"] == tokenizer.decode(ids)
    assert body["prompt"].startswith(tokenizer.eos_token)
    assert body["prompt"].endswith("�")


@pytest.mark.parametrize(
    ("tokens", "field"),
    [
        ([1, tiny_configs.VOCAB], "tokens.1"),
        ([-1], "tokens.0"),
        ([2**70], "tokens.0"),
        (["1"], "tokens.0"),
        ([True], "tokens.0"),
        ("Hi", "tokens"),
    ],
)
async def test_a_token_id_that_does_not_exist_is_refused_by_its_place(
    served: Served, tokens: Any, field: str
) -> None:
    error = await refused(served, 422, "invalid_field", path="/detokenize", json={"tokens": tokens})
    assert error["field"] == field


async def test_both_need_a_key_where_generating_does(serve: Serve) -> None:
    served = await serve(api_keys="user")
    for path, body in (("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [1]})):
        assert (await served.client.post(path, json=body)).status_code == 401
        headers = {"Authorization": "Bearer user"}
        assert (await served.client.post(path, json=body, headers=headers)).status_code == 200


async def test_it_waits_for_a_thread_as_its_key_and_until_the_deadline(
    serve: Serve, tmp_path: Path
) -> None:
    """All keys waited as one, without end: 20 MiB of one kept a word of another waiting."""
    headers = api_keys.add(tmp_path / "keys.json", "web")
    served = await serve(keys_file=tmp_path / "keys.json", request_timeout_s=1.0)
    encoder = served.app.state.frontend.encoder
    go = threading.Event()
    for lane in encoder._lanes:
        lane.is_busy = True
        lane.thread.submit(go.wait)
    try:
        sent = served.client.post("/tokenize", json={"prompt": "Hi"}, headers=headers)
        async with asyncio.timeout(30):
            waiting = asyncio.create_task(sent)
            while not len(encoder._queue):
                await asyncio.sleep(0.01)
            assert [ticket.owner for ticket in encoder._queue._waiting] == ["web"]
            assert (await waiting).json()["error"]["code"] == "deadline_exceeded"
    finally:
        go.set()
