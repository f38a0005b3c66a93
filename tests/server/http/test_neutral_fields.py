"""Fields of OpenAI and vLLM: taken where they change nothing, else honoured or refused by name."""

from typing import Any

import pytest
from api import Served, refused

COMPLETION: dict[str, Any] = {"model": "base", "prompt": "Hi"}
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
# What `vllm bench serve` and other clients send although it changes nothing.
NEUTRAL: dict[str, list[Any]] = {
    "user": ["me"],
    "metadata": [{"run": "1"}],
    "safety_identifier": ["me"],
    "prompt_cache_key": ["key"],
    "store": [False],
    "service_tier": ["auto", "default"],
    "logit_bias": [{}],
    "stop": [[]],
    "stop_token_ids": [[]],
    "repetition_penalty": [1, 1.0],
    "top_k": [-1, 0],
    "min_p": [0],
    "min_tokens": [0],
    "use_beam_search": [False],
    "length_penalty": [1, 1.0],
    "spaces_between_special_tokens": [True],
    "bad_words": [[]],
    "priority": [0],
    "response_format": [{"type": "text"}],
    "cache_salt": [""],
    "kv_transfer_params": [{}],
    "logits_processors": [[]],
    "mm_processor_kwargs": [{}],
    "detokenize": [True],
}
NEUTRAL_COMPLETION = {
    "best_of": [1],
    "suffix": [""],
    "echo": [False],
    "tools": [[]],
    "tool_choice": ["none"],
    "parallel_tool_calls": [True, False],
    "chat_template_kwargs": [{}],
    "add_generation_prompt": [True],
    "top_logprobs": [],
}
NEUTRAL_CHAT = {
    "best_of": [1],
    "suffix": [""],
    "add_special_tokens": [False],
    "tools": [[]],
    "tool_choice": ["none"],
    "functions": [[]],
    "function_call": ["none"],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"]],
    "prediction": [{"type": "content", "content": "Hi"}],
    "prompt_cache_options": [{"mode": "explicit"}],
    "prompt_cache_retention": ["24h"],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "add_generation_prompt": [True],
    "chat_template_kwargs": [{}],
}
REFUSED: dict[str, list[Any]] = {
    "store": [True, 0],
    "service_tier": ["flex", "priority"],
    "use_beam_search": [True],
    "length_penalty": [2, True],
    "spaces_between_special_tokens": [False, 1],
    "bad_words": [["a"]],
    "truncate_prompt_tokens": [5],
    "allowed_token_ids": [[5]],
    "prompt_logprobs": [1],
    "cache_salt": ["salt"],
    "kv_transfer_params": [{"do_remote_decode": True}],
    "logits_processors": [["a.b"]],
    "mm_processor_kwargs": [{"num_crops": 4}],
    "detokenize": [False],
}
REFUSED_COMPLETION = {
    "suffix": [" end"],
    "best_of": [2],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["auto"],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "add_generation_prompt": [False],
    "top_logprobs": [1],
}
REFUSED_CHAT = {
    "best_of": [2],
    "suffix": [" end"],
    "add_special_tokens": [True],
    "modalities": [["text", "audio"]],
    "audio": [{"voice": "alloy"}],
    "reasoning_effort": ["high"],
    "verbosity": ["low"],
    "web_search_options": [{}],
    "moderation": [{}],
    "continue_final_message": [True],
    "chat_template": ["{{ messages }}"],
    "chat_template_kwargs": [{"chat_template": "x"}, {"tools": []}, {"messages": []}],
}


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/completions", COMPLETION, NEUTRAL | NEUTRAL_COMPLETION),
        ("/v1/chat/completions", CHAT, NEUTRAL | NEUTRAL_CHAT),
    ],
)
async def test_a_neutral_value_changes_nothing(
    served: Served, path: str, body: dict[str, Any], fields: dict[str, list[Any]]
) -> None:
    body = {**body, "seed": 1}
    await served.client.post(path, json=body)
    without = served.engine.requests[-1]
    for name, values in fields.items():
        for value in (*values, None):
            response = await served.client.post(path, json={**body, name: value})
            assert response.status_code == 200, response.text
            request = served.engine.requests[-1]
            assert request.prompt_ids == without.prompt_ids
            assert request.sampling == without.sampling


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/completions", COMPLETION, REFUSED | REFUSED_COMPLETION),
        ("/v1/chat/completions", CHAT, REFUSED | REFUSED_CHAT),
    ],
)
async def test_a_value_that_cannot_be_honoured_is_refused_by_name(
    served: Served, path: str, body: dict[str, Any], fields: dict[str, list[Any]]
) -> None:
    for name, values in fields.items():
        for value in values:
            request = {"path": path, "json": {**body, name: value}}
            error = await refused(served, 422, "invalid_field", **request)
            assert error["param"] == name


async def test_obfuscation_of_a_stream_may_be_declined_but_not_asked_for(served: Served) -> None:
    for value, status in ((False, 200), (None, 200), (True, 422)):
        body = {**CHAT, "stream": True, "stream_options": {"include_obfuscation": value}}
        response = await served.client.post("/v1/chat/completions", json=body)
        assert response.status_code == status


async def test_best_of_n_of_n_is_n(served: Served) -> None:
    body = {**COMPLETION, "n": 3, "best_of": 3}
    response = await served.client.post("/v1/completions", json=body)
    assert len(response.json()["choices"]) == 3
