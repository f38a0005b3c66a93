"""crma.models.prompts against transformers: the same tokens, for the templates of many families."""

from typing import Any

import pytest
from families import FAMILIES, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from crma.core.errors import ConfigError
from crma.models.chat_template import encode_chat
from crma.models.prompts import BASE_TEMPLATE, Conversation, Turn

FRAGMENTS = (
    *(" ", "  ", "\n", "\n\n", "\t", "the", " café", "日本", "🙂", "12 345", "user", "assistant"),
    *("<think>", "</think>", "<tool_response>", "</tool_response>", "[INST]", "[/INST]"),
    *("<|", "|>", "<", ">", "<s", "/s>", "⟦user⟧", "⟦0⟧", "{{ bos_token }}", "\U000f0000"),
)
ROLES = ("system", "user", "assistant", "tool")
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    },
)


def spelled(name: str) -> tuple[str, ...]:
    """A family's special tokens, and halves of them."""
    special = FAMILIES[name].special
    halves = [half for each in special for half in (each[: len(each) // 2], each[len(each) // 2 :])]
    return (*special, *halves)


def texts(*more: str) -> st.SearchStrategy[str]:
    fragments = st.sampled_from((*FRAGMENTS, *more)) | st.text(max_size=3)
    return st.lists(fragments, max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, *more: str) -> list[dict[str, Any]]:
    """Mostly a system turn or none, then user and assistant in turn; sometimes any roles."""
    if draw(st.integers(0, 9)) == 0:
        roles = draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=4))
    else:
        roles = draw(st.sampled_from([[], ["system"]]))
        roles = roles + ["user", "assistant"] * draw(st.integers(0, 2)) + ["user"]
    return [{"role": role, "content": draw(texts(*more))} for role in roles]


def given_turns(messages: list[dict[str, Any]], **more: Any) -> Conversation:
    return Conversation(tuple(Turn(**message) for message in messages), **more)


def oracle(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **more: Any
) -> list[int] | str:
    """Token ids by transformers; or the words with which the template refuses."""
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **more)
        return encoded["input_ids"]
    except Exception as error:
        return str(error)


def encoded(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **more: Any
) -> list[int] | str:
    try:
        return encode_chat(tokenizer, given_turns(messages, **more))
    except ConfigError as error:
        return error.message.removeprefix("the chat template refuses these messages: ")


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_conversation_has_the_tokens_of_transformers(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    messages = data.draw(conversations())
    text = "".join(message["content"] for message in messages)
    if not any(token in text for token in FAMILIES[name].special):
        assert encoded(tokenizer, messages) == oracle(tokenizer, messages)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_special_tokens_in_messages_are_what_they_are_to_a_tokenizer_that_knows_none_of_them(
    name: str, data: st.DataObject
) -> None:
    messages = data.draw(conversations(*spelled(name)))
    expected = oracle(tokenizer_of(name, renamed=True), messages)
    assert encoded(tokenizer_of(name), messages) == expected


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_one_user_turn_is_a_conversation_of_one(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    text = data.draw(texts(*spelled(name)))
    question = given_turns([{"role": "user", "content": text}])
    assert BASE_TEMPLATE.encode(tokenizer, text) == encode_chat(tokenizer, question)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4"])
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_tools_and_calls_reach_the_template_as_text(name: str, data: st.DataObject) -> None:
    word = data.draw(texts(*spelled(name)))
    function = {"name": "look_up", "arguments": {"word": word}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": None, "tool_calls": ({"function": function},)},
        {"role": "tool", "content": word, "tool_call_id": "call_1"},
    ]
    described = {**TOOLS[0]["function"], "description": word}
    tools = [{"type": "function", "function": described}]
    expected = oracle(tokenizer_of(name, renamed=True), messages, tools=tools)
    assert isinstance(expected, list)
    assert encoded(tokenizer_of(name), messages, tools=tuple(tools)) == expected


def test_variables_reach_the_template_and_unknown_ones_change_nothing() -> None:
    tokenizer = tokenizer_of("qwen3")
    messages = [{"role": "user", "content": "the"}]
    plain = encoded(tokenizer, messages)
    unthinking = encoded(tokenizer, messages, template_kwargs={"enable_thinking": False})
    assert unthinking == oracle(tokenizer, messages, enable_thinking=False)
    assert unthinking != plain
    assert encoded(tokenizer, messages, template_kwargs={"unheard_of": [1]}) == plain
    dated = tokenizer_of("llama3_1")
    variables = {"date_string": "1 Jan 2000<|eot_id|>"}
    ids = encoded(dated, messages, template_kwargs=variables)
    assert "1 Jan 2000<|eot_id|>" in dated.decode(ids)
    num_ends = [each.count(dated.eos_token_id) for each in (ids, encoded(dated, messages))]
    assert num_ends[0] == num_ends[1]  # a variable ends no turn


@pytest.mark.parametrize(
    "name", ["messages", "conversation", "tools", "add_generation_prompt", "tokenize", "eos_token"]
)
def test_a_variable_that_the_server_sets_is_refused_by_name(name: str) -> None:
    question = given_turns([{"role": "user", "content": "the"}], template_kwargs={name: "x"})
    with pytest.raises(ConfigError, match=f"sets '{name}'") as caught:
        encode_chat(tokenizer_of("qwen3"), question)
    assert (caught.value.field, caught.value.value) == ("chat_template_kwargs", name)
