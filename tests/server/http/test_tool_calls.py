"""Tools of OpenAI's clients: what the model is shown and held to, and the calls in its answer."""

import json
from typing import Any

import pytest
from api import Served, refused
from hypothesis import given
from hypothesis import strategies as st

from crma.models.tools import GENERIC, HERMES, LLAMA, ToolMarkup
from server.engine.request import ConstraintKind, FinishReason
from server.http.tool_calls import ToolCallReader

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather in Bern?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop"}},
]
CHAT = {"model": "base", "messages": MESSAGES, "tools": TOOLS}
NAMED = {"type": "function", "function": {"name": "stop"}}
CALL = GENERIC.call("get_weather", {"city": "Bern"})


async def choice_of(served: Served, text: str, **fields: Any) -> dict[str, Any]:
    served.engine.answer = lambda _: text
    response = await served.client.post(PATH, json={**CHAT, **fields})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name and arguments of the calls of a message, whose form is checked."""
    found = []
    for call in message["tool_calls"]:
        assert list(call) == ["id", "type", "function"]
        assert call["id"].startswith("call_")
        function = call["function"]
        found.append((function["name"], json.loads(function["arguments"])))
    assert len({call["id"] for call in message["tool_calls"]}) == len(found)
    return found


async def test_an_answer_with_a_call_has_it_parsed_and_no_content(served: Served) -> None:
    choice = await choice_of(served, CALL)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert called(choice["message"]) == [("get_weather", {"city": "Bern"})]


async def test_text_before_calls_is_the_content(served: Served) -> None:
    text = f"Let me see.\n{CALL}\n{GENERIC.call('stop', {})}"
    choice = await choice_of(served, text)
    assert choice["message"]["content"] == "Let me see."
    assert called(choice["message"]) == [("get_weather", {"city": "Bern"}), ("stop", {})]


async def test_an_answer_without_calls_is_as_it_was(served: Served) -> None:
    choice = await choice_of(served, "It rains < {now}.")
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {
        "role": "assistant",
        "content": "It rains < {now}.",
        "refusal": None,
    }


async def test_a_call_that_was_cut_keeps_its_reason_and_what_there_is(served: Served) -> None:
    served.engine.ending = (FinishReason.LENGTH, None)
    choice = await choice_of(served, CALL[:60])
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "B'}


async def test_a_stream_brings_id_and_name_first_and_then_pieces_of_arguments(
    served: Served,
) -> None:
    served.engine.answer = lambda _: f"Let me see.\n{CALL}"
    response = await served.client.post(PATH, json={**CHAT, "stream": True})
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    deltas = [choice["delta"] for choice in choices]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert list(calls[0]) == ["index", "id", "type", "function"]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert all(list(call) == ["index", "function"] for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}'
    assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "tool_calls"]


CONSTRAINED = [(None, False), ("auto", False), ("required", True), (NAMED, True)]


@pytest.mark.parametrize(("tool_choice", "needs_call"), CONSTRAINED)
async def test_the_choice_of_tools_constrains_the_answer(
    served: Served, tool_choice: Any, needs_call: bool
) -> None:
    await choice_of(served, CALL, tool_choice=tool_choice)
    found = served.engine.requests[-1].sampling.constraint
    assert found is not None
    assert found.kind is ConstraintKind.GRAMMAR
    assert ("TEXT" not in found.source) is needs_call
    assert ("get_weather" not in found.source) is (tool_choice == NAMED)


async def test_the_model_is_shown_the_tools_unless_none_may_be_called(served: Served) -> None:
    async def prompt(**fields: Any) -> str:
        await choice_of(served, "Hi", **fields)
        ids = served.engine.requests[-1].prompt_ids
        return served.app.state.frontend.tokenizer.decode(ids)

    assert "get_weather" in await prompt()
    assert "get_weather" not in await prompt(tool_choice="none")
    assert await prompt(tool_choice="none") == await prompt(tools=[])
    assert served.engine.requests[-1].sampling.constraint is None


async def test_a_conversation_goes_on_with_the_answer_and_the_results_of_its_calls(
    served: Served,
) -> None:
    message = (await choice_of(served, CALL))["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    await choice_of(served, "It rains.", messages=[*MESSAGES, message, result])
    ids = served.engine.requests[-1].prompt_ids
    shown = served.app.state.frontend.tokenizer.decode(ids)
    assert CALL in shown
    assert "<tool_response>\nrain\n</tool_response>" in shown


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


ODD = {"type": "object", "not": {}}
REFUSED = [
    (
        422,
        "invalid_field",
        {"tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
    ),
    (422, "invalid_field", {"tool_choice": "required", "tools": []}, "tool_choice"),
    (422, "invalid_field", {"tool_choice": "any"}, "tool_choice"),
    (422, "invalid_field", {"tools": [{"type": "web_search"}]}, "tools.0.type"),
    (422, "invalid_field", {"tools": [tool(name="a b")]}, "tools.0.function.name"),
    (422, "unknown_field", {"tools": [tool(schema={})]}, "tools.0.function.schema"),
    (422, "invalid_field", {"response_format": {"type": "json_object"}}, "response_format"),
    (400, "invalid_constraint", {"tools": [tool(parameters=ODD, strict=True)]}, "tools"),
    (400, "invalid_constraint", {"tools": [tool(parameters={"type": "text"})]}, "tools"),
]


@pytest.mark.parametrize(("status", "code", "fields", "field"), REFUSED)
async def test_tools_that_cannot_be_honoured_are_refused_by_name(
    served: Served, status: int, code: str, fields: Any, field: str
) -> None:
    error = await refused(served, status, code, path=PATH, json={**CHAT, **fields})
    assert error["param"] == field


# The reader of one answer -------------------------------------------------------------------------

ARGUMENTS = st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()), max_size=3)
TEXTS = st.text(st.characters(blacklist_characters="<{", blacklist_categories=["Cs"]), max_size=12)


@given(TEXTS, st.lists(ARGUMENTS, max_size=3), st.integers(1, 9))
def test_an_answer_is_read_alike_in_any_pieces(text: str, calls: Any, size: int) -> None:
    written = [HERMES.call(f"f{i}", arguments) for i, arguments in enumerate(calls)]
    check(HERMES, text + "\n".join(written), text, calls, size)


@given(ARGUMENTS, st.integers(1, 9))
def test_a_call_of_llama_is_read_alike_in_any_pieces(arguments: Any, size: int) -> None:
    check(LLAMA, LLAMA.call("f0", arguments), "", [arguments], size)


def check(markup: ToolMarkup, whole: str, text: str, calls: Any, size: int) -> None:
    reader = ToolCallReader(markup)
    deltas = []
    for start in range(0, len(whole), size):
        deltas += reader.read(whole[start : start + size])
    deltas += reader.read("", is_last=True)
    content = "".join(delta.get("content", "") for delta in deltas)
    assert content == (text.rstrip() if calls else text)
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in reader.calls]
    assert [name for name, _ in found] == [f"f{i}" for i in range(len(calls))]
    assert [json.loads(arguments) for _, arguments in found] == calls
    streamed = [part for delta in deltas for part in delta.get("tool_calls", [])]
    for index, (_, arguments) in enumerate(found):
        pieces = [part["function"]["arguments"] for part in streamed if part["index"] == index]
        assert "".join(pieces) == arguments
