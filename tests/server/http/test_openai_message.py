"""server.http.openai_message: the messages that clients send, our own answers among them."""

from typing import Any

import pytest
from api import Served, refused
from openai.types.chat import ChatCompletionMessage

from crma.models.prompts import Turn
from server.http.openai_message import Message

CALL: dict[str, Any] = {
    "id": "call-1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 1}'},
}
TURNS: list[tuple[dict[str, Any], Turn]] = [
    ({"role": "user", "content": "Hi"}, Turn("user", "Hi")),
    ({"role": "user", "content": "Hi", "name": "Ann"}, Turn("user", "Hi", name="Ann")),
    ({"role": "developer", "content": "Be brief."}, Turn("system", "Be brief.")),
    (
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        Turn("user", "ab"),
    ),
    (
        {"role": "tool", "content": "3", "tool_call_id": "call-1"},
        Turn("tool", "3", tool_call_id="call-1"),
    ),
    (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        Turn(
            "assistant",
            None,
            tool_calls=(
                {
                    "id": "call-1",
                    "type": "function",
                    "function": {"name": "add", "arguments": {"a": 1}},
                },
            ),
        ),
    ),
]
EMPTY: dict[str, list[Any]] = {
    "refusal": [None, ""],
    "annotations": [None, []],
    "audio": [None],
    "function_call": [None],
    "tool_calls": [None, []],
    "reasoning": [None, ""],
    "reasoning_content": [None, ""],
    "provider_specific_fields": [None, {}],
    "parsed": [None, {"a": 1}],
}
ASSISTANT = {"role": "assistant", "content": "Yes"}
# A message, and the name of the part at fault.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"role": "user", "content": None}, "content"),
    ({"role": "user"}, "content"),
    ({"role": "assistant", "content": None}, "content"),
    (ASSISTANT | {"refusal": "No."}, "refusal"),
    (ASSISTANT | {"reasoning": "Hm."}, "reasoning"),
    (ASSISTANT | {"annotations": [{}]}, "annotations"),
    (ASSISTANT | {"audio": {"id": "a"}}, "audio"),
    (ASSISTANT | {"function_call": {"name": "add", "arguments": ""}}, "function_call"),
    (ASSISTANT | {"tool_call_id": "call-1"}, "tool_call_id"),
    ({"role": "user", "content": "Hi", "tool_calls": [CALL]}, "tool_calls"),
    (ASSISTANT | {"tool_calls": [CALL | {"type": "custom"}]}, "tool_calls.0.type"),
    (
        ASSISTANT | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": "{"}}]},
        "tool_calls.0.function.arguments",
    ),
    (
        ASSISTANT | {"tool_calls": [CALL | {"function": {"name": "a", "arguments": "[" * 90000}}]},
        "tool_calls.0.function.arguments",
    ),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content"),
]


@pytest.mark.parametrize(("message", "turn"), TURNS)
def test_a_message_becomes_a_turn(message: dict[str, Any], turn: Turn) -> None:
    assert Message.model_validate(message).turn() == turn


async def test_our_own_message_can_be_sent_back(served: Served) -> None:
    """`messages.append(answer.choices[0].message)` was a 422."""
    path = "/v1/chat/completions"
    body: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
    answer = (await served.client.post(path, json=body)).json()
    message = answer["choices"][0]["message"]
    of_the_client = ChatCompletionMessage.model_validate(message)
    for sent in (of_the_client.model_dump(), of_the_client.model_dump(exclude_unset=True)):
        messages = [*body["messages"], sent, *body["messages"]]
        response = await served.client.post(path, json=body | {"messages": messages})
        assert response.status_code == 200, response.text
    for name, values in EMPTY.items():
        for value in values:
            messages = [*body["messages"], message | {name: value}, *body["messages"]]
            response = await served.client.post(path, json=body | {"messages": messages})
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(("message", "part"), REFUSED)
async def test_a_message_is_refused_with_the_name_of_the_part_at_fault(
    served: Served, message: dict[str, Any], part: str
) -> None:
    body = {"model": "base", "messages": [message]}
    request = {"path": "/v1/chat/completions", "json": body}
    error = await refused(served, 422, "invalid_field", **request)
    assert error["param"] == f"messages.0.{part}"


@pytest.mark.parametrize("content", ["", None])
async def test_calls_that_the_chat_template_does_not_render_are_refused_by_name(
    served: Served, content: str | None
) -> None:
    """They were left out in silence, or a 422 in the words of Jinja."""
    user = {"role": "user", "content": "Hi"}
    called = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    body: dict[str, Any] = {"model": "base", "messages": [user, called, user]}
    for path in ("/v1/chat/completions", "/tokenize"):
        error = await refused(served, 422, "invalid_field", path=path, json=body)
        field = error["param" if path.startswith("/v1/") else "field"]
        assert field == "messages.1.tool_calls"
        assert "does not render tool calls" in error["message"]
    tools = [{"type": "function", "function": {"name": "add"}}]
    response = await served.client.post("/v1/chat/completions", json=body | {"tools": tools})
    assert response.status_code == 200, response.text
