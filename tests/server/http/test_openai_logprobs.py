"""Log-probabilities under /v1: OpenAI's types and meaning, whole and streamed."""

import json
from itertools import pairwise
from typing import Any

import pytest
import tiny
import tiny_configs
from api import Served
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.inference_engine import Outputs
from server.engine.request import Request, RequestOutput, TokenLogprob
from server.http.openai_logprobs import LEAST, CompletionLogprobs, TextOffsets, chat_logprob
from server.service.token_texts import TokenTexts

COMPLETION: dict[str, Any] = {"model": "base", "prompt": "Hi"}
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
EMOJI = "A 😀 B"  # as tokens: "A", " " and half of the 😀, a quarter, a quarter, " ", "B"
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


async def completion(served: Served, **body: Any) -> dict[str, Any]:
    """The choices of a completion."""
    response = await served.client.post("/v1/completions", json=COMPLETION | body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


async def streamed(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of every chunk of a stream, in their order."""
    response = await served.client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    return [choice for chunk in chunks for choice in chunk["choices"]]


def joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that the chunks of /v1/completions add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        choice = choices.setdefault(chunk["index"], {"index": chunk["index"], "text": ""})
        choice["text"] += chunk["text"]
        choice["finish_reason"] = chunk["finish_reason"]
        lists = choice.setdefault("logprobs", {})
        for name, values in (chunk["logprobs"] or {}).items():
            lists[name] = lists.get(name, []) + values
    return [choices[index] for index in sorted(choices)]


async def test_the_place_of_a_token_is_counted_in_characters(served: Served) -> None:
    """Parts of the 😀 counted as a character each."""
    (choice,) = await completion(served, prompt=EMOJI, echo=True, logprobs=1)
    assert choice["text"] == EMOJI + "one two"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2, 3, 4, 5, 6]
    names = choice["logprobs"]["tokens"]
    assert names[:6] == ["A", r"bytes: \xf0\x9f", r"bytes:\x98", r"bytes:\x80", " ", "B"]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(text=TEXTS)
def test_a_token_begins_after_the_whole_characters_before_it(text: str) -> None:
    for tokenizer in (tiny.tokenizer(), tiny.byte_fallback_tokenizer()):
        texts = TokenTexts(tokenizer)
        ids = tokenizer.encode(text)
        offsets = TextOffsets(texts, skips_special=True)
        found = offsets.of_prompt(ids, text) + offsets.of_answer([0])
        data = b"".join(texts.bytes_of(token_id) for token_id in ids)
        num_added = len(data) - len(text.encode())  # the space that the second one puts before it
        position = -num_added
        for token_id, place in zip(ids, found, strict=False):
            before = text.encode()[: max(0, position)].decode("utf-8", "ignore")
            assert place == len(before)
            position += len(texts.bytes_of(token_id))
        assert found[-1] == len(text)


def test_a_start_token_has_no_place_in_a_prompt_sent_as_text() -> None:
    offsets = TextOffsets(TokenTexts(tiny.tokenizer()), skips_special=True)
    assert offsets.of_prompt([0, 34, 35], "AB") == [0, 0, 1]
    assert offsets.of_answer([36, 1, 37]) == [2, 3, 3], "special tokens have no text"
    offsets = TextOffsets(TokenTexts(tiny.tokenizer()), skips_special=False)
    assert offsets.of_prompt([0, 34], "<|im_start|>A") == [0, 12]
    assert offsets.of_answer([1, 37]) == [13, 23]


async def test_prompts_are_echoed_with_the_log_probabilities_of_their_tokens(
    served: Served,
) -> None:
    choices = await completion(served, prompt=[[5, 9, 40], [7, 8]], echo=True, logprobs=1, n=2)
    first, second = [5, 9, 40, 5, 6], [7, 8, 5, 6]  # prompt and answer
    for choice, ids in zip(choices, [first, first, second, second], strict=True):
        names = [tiny.tokenizer().decode([token_id]) for token_id in ids]
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == names
        assert choice["text"] == "".join(names[:-2]) + "one two"
        values = [None, *[-1.0] * (len(ids) - 3), -0.5, -0.25]
        assert logprobs["token_logprobs"] == values
        start = tiny.tokenizer().decode([0])
        expected = [None]
        for name, value in zip(names[1:], values[1:], strict=True):
            expected.append({start: 0.0, name: value})
        assert logprobs["top_logprobs"] == expected, "the chosen token is always among them"


async def test_an_echo_returns_the_prompt_as_it_was_sent_and_needs_no_answer(
    served: Served,
) -> None:
    for prompt, text in ((EMOJI, EMOJI), ([0, 34], "<|im_start|>A")):
        (choice,) = await completion(served, prompt=prompt, echo=True, max_tokens=0)
        assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
        assert served.engine.requests[-1].sampling.max_tokens == 0
    (choice,) = await completion(served, prompt=EMOJI, echo=True, max_tokens=0, logprobs=0)
    logprobs = choice["logprobs"]
    assert [len(each) for each in logprobs.values()] == [6] * 4
    assert logprobs["token_logprobs"] == [None, *[-1.0] * 5]
    assert logprobs["top_logprobs"][1] == {r"bytes: \xf0\x9f": -1.0}


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_a_stream_adds_up_to_the_whole_answer(
    served: Served, echo: bool, logprobs: int | None, max_tokens: int
) -> None:
    if max_tokens == 0 and not echo:
        return
    body = {"prompt": [EMOJI, "B"], "echo": echo, "logprobs": logprobs, "max_tokens": max_tokens}
    body = COMPLETION | body | {"n": 2, "seed": 1}
    whole = await completion(served, **body)
    for choice in whole:
        choice["logprobs"] = choice["logprobs"] or {}
    assert joined(await streamed(served, "/v1/completions", body)) == whole


async def test_a_streamed_echo_waits_for_the_log_probabilities_of_its_prompt(
    served: Served,
) -> None:
    """They come with the first output of the first answer, which need not be the first to come."""
    submit = served.engine.submit

    async def turned_round(request: Request) -> Outputs:
        outputs: list[RequestOutput] = [output async for output in submit(request)]
        for output in sorted(outputs, key=lambda each: -each.index):
            yield output

    body = COMPLETION | {"prompt": "AB", "echo": True, "logprobs": 0, "n": 2, "seed": 1}
    whole = await completion(served, **body)
    served.engine.submit = turned_round
    chunks = await streamed(served, "/v1/completions", body)
    assert joined(chunks) == whole
    for earlier, later in pairwise(chunks):
        assert earlier["index"] >= later["index"]


async def test_a_chat_stream_brings_the_entries_of_the_whole_answer(served: Served) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2}
    response = await served.client.post("/v1/chat/completions", json=body)
    (choice,) = response.json()["choices"]
    chunks = await streamed(served, "/v1/chat/completions", body)
    entries = [
        each for chunk in chunks if chunk["logprobs"] for each in chunk["logprobs"]["content"]
    ]
    assert entries == choice["logprobs"]["content"]
    assert set(choice["logprobs"]) == {"content", "refusal"}
    entry = entries[0]
    assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
    assert [set(each) for each in entry["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2


def test_the_bytes_of_a_part_of_a_character_are_its_bytes() -> None:
    """They were null."""
    texts = TokenTexts(tiny.tokenizer())
    first, second, *_ = tiny.tokenizer().encode("😀")
    entry = chat_logprob(texts, first, TokenLogprob(-0.5, ((first, -0.5), (second, -1.0))))
    assert entry["bytes"] == [0xF0, 0x9F]
    assert entry["token"] == r"\xf0\x9f"
    assert [each["bytes"] for each in entry["top_logprobs"]] == [[0xF0, 0x9F], [0x98]]


def test_an_impossible_token_has_openais_least_log_probability() -> None:
    """JSON has no infinity: the answer could not be written."""
    texts = TokenTexts(tiny.tokenizer())
    impossible = TokenLogprob(-float("inf"), ((7, -float("inf")),))
    assert chat_logprob(texts, 5, impossible)["logprob"] == LEAST
    lists = CompletionLogprobs(texts, skips_special=True).of_answer([5], [impossible])
    assert lists["token_logprobs"] == [LEAST]
    assert list(lists["top_logprobs"][0].values()) == [LEAST, LEAST]


def test_of_two_tokens_without_a_text_the_most_probable_counts() -> None:
    nowhere = tiny_configs.VOCAB + 5  # as any other id beyond the vocabulary, it has no text
    logprob = TokenLogprob(-3.0, ((nowhere, -1.0), (nowhere + 1, -2.0)))
    logprobs = CompletionLogprobs(TokenTexts(tiny.tokenizer()), skips_special=True)
    assert logprobs.of_answer([nowhere + 2], [logprob])["top_logprobs"] == [{"": -1.0}]
