"""Chats: what is sent, and how streams of them are read, wherever they are split."""

import json
from typing import Any

import httpx
import pytest
from crma_client import AsyncClient, Client, errors
from crma_client.chats import ChatReader
from crma_client.streams import TokenReader

CALL = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    return f"data: {json.dumps({'id': 'chat-1', 'choices': [choice], **more})}\n\n"


CHAT = "".join(
    [
        chunk({"role": "assistant", "content": "né"}),
        chunk({"content": "🦜"}),
        chunk({"tool_calls": [{"index": 0, **CALL, "function": {"name": "add", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
        chunk({}, "tool_calls", provenance={"base": "sha256:0"}),
        'data: {"id": "chat-1", "choices": [], "usage": {"completion_tokens": 2}}\n\n',
        "data: [DONE]\n\n",
    ]
).encode()

GENERATION = (
    'event: token\ndata: {"index": 0, "text": "né", "logprob": -1.0}\n\n'
    'event: token\ndata: {"index": 0, "text": "🦜", "logprob": -2.0}\n\n'
    'event: done\ndata: {"id": "gen-1", "index": 0, "finish_reason": "stop", "crma": true, '
    '"usage": {}, "timings": {}, "provenance": {}}\n\n'
).encode()


def test_a_streamed_chat_is_the_same_wherever_it_is_split() -> None:
    for cut in range(len(CHAT) + 1):
        reader = ChatReader()
        tokens = [token for part in (CHAT[:cut], CHAT[cut:]) for token in reader.feed(part)]
        assert [token.text for token in tokens] == ["né", "🦜"], cut
        chat = reader.result()
        assert (chat.text, list(chat.tool_calls)) == ("né🦜", [CALL])
        assert chat.choices[0].finish_reason == "tool_calls"
        assert chat.usage == {"completion_tokens": 2}
        assert chat.provenance == {"base": "sha256:0"}


def test_a_streamed_generation_is_the_same_wherever_it_is_split() -> None:
    for cut in range(len(GENERATION) + 1):
        reader = TokenReader()
        parts = (GENERATION[:cut], GENERATION[cut:])
        tokens = [token for part in parts for token in reader.feed(part)]
        assert [(token.text, token.logprob) for token in tokens] == [("né", -1.0), ("🦜", -2.0)]
        assert reader.result().text == "né🦜"


def test_a_chat_that_breaks_off_has_no_result() -> None:
    reader = ChatReader()
    list(reader.feed(CHAT.removesuffix(b"data: [DONE]\n\n")))
    with pytest.raises(errors.ProtocolError, match=r"\[DONE\]"):
        reader.result()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ('{"error": {"message": "late", "param": "n"}}', errors.GenerationFailed),
        ('{"choices": 1}', errors.ProtocolError),
        ('{"choices": [{"delta": {}}]}', errors.ProtocolError),
        ("{", errors.ProtocolError),
    ],
)
def test_a_chat_that_fails_or_is_nonsense_is_an_error_of_this_package(
    data: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        list(ChatReader().feed(f"data: {data}\n\n".encode()))


async def test_a_conversation_names_its_model_and_both_clients_send_the_same() -> None:
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, json.loads(request.read())))
        return httpx.Response(200, content=CHAT)

    turn = {"role": "user", "content": "Hi"}
    options: dict[str, Any] = {"task": "legal@v1", "crma": False, "tools": [], "seed": 3}
    transport = httpx.MockTransport(answer)
    with Client(transport=transport) as client, client.stream_chat([turn], **options) as stream:
        list(stream)
    async with (
        AsyncClient(transport=transport) as awaited,
        awaited.stream_chat([turn], **options) as awaited_stream,
    ):
        tokens = [token async for token in awaited_stream]
    assert len(tokens) == 2
    assert stream.result == awaited_stream.result
    fields = {"model": "legal@v1", "messages": [turn], "crma": False, "tools": [], "seed": 3}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert sent == [("/v1/chat/completions", {**fields, **streamed})] * 2
