"""crma.models.tools: how chat templates write calls, and grammars that hold answers to that."""

import copy
from typing import Any

import pytest
import tiny
from families import tokenizer_of
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from crma.core.errors import ConfigError
from crma.models.chat_template import encode_chat
from crma.models.prompts import Conversation, Turn
from crma.models.tools import LLAMA, ToolMarkup, tool_markup

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
STOP = {"name": "stop-all", "description": "Ends it."}
FUNCTIONS = [WEATHER, STOP]
BERN = {"city": 'B "{é} \\', "days": 3}
ASKED = Conversation((Turn("system", "Be brief."), Turn("user", "Weather in Bern?")))
CALLED = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": BERN},
}
ANSWERED = Conversation(
    (
        *ASKED.turns,
        Turn("assistant", None, tool_calls=(CALLED,)),
        Turn("tool", "rain", tool_call_id="call_1"),
    )
)
FORMS = {"qwen2_5": ("<tool_call>", True), "qwen3": ("<tool_call>", True)}
FORMS |= {
    "llama3_1": ("", True),
    "smollm2": ("<tool_call>", False),
    "zephyr": ("<tool_call>", False),
}


def accepts(tokenizer: PreTrainedTokenizerFast, grammar: str, text: str) -> bool:
    """Whether a text may be a whole answer."""
    lark = LLMatcher.grammar_from_lark(grammar)
    matcher = LLMatcher(from_tokenizer(tokenizer), lark, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_calls_is_read_off_the_chat_template(name: str) -> None:
    markup = tool_markup(tokenizer_of(name))
    assert (markup.begin.strip(), markup.in_template) == FORMS[name]


def test_a_template_that_writes_calls_in_another_form_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="does not know") as caught:
        tool_markup(tokenizer_of("glm4"))
    assert caught.value.field == "tools"


@pytest.mark.parametrize("name", FORMS)
def test_the_prompt_shows_the_tools_the_calls_and_their_results(name: str) -> None:
    tokenizer = tokenizer_of(name)
    markup = tool_markup(tokenizer)
    prompt = tokenizer.decode(encode_chat(tokenizer, markup.conversation(ANSWERED, FUNCTIONS)))
    for part in ("get_weather", "Weather of a city.", "stop-all", "Be brief.", "rain"):
        assert part in prompt
    assert markup.call("get_weather", BERN) in prompt


def texts(markup: ToolMarkup) -> dict[str, str]:
    one = markup.call("get_weather", BERN)
    return {
        "a call": one,
        "a call without arguments": markup.call("stop-all", {}),
        "two calls": f"{one}\n{markup.call('stop-all', {})}",
        "a text": "It rains {now} <b>.",
        "nothing": "",
        "a text and a call": f"Let me see.\n{one}",
        "an unknown function": markup.call("other", {}),
        "a missing argument": markup.call("get_weather", {"days": 3}),
        "an argument of another type": markup.call("get_weather", {"city": 5}),
        "half a call": one[: len(one) // 2],
    }


CALLS = {"a call", "a call without arguments"}
HERMES_AUTO = CALLS | {"two calls", "a text", "nothing", "a text and a call"}
# A call of Llama is a whole answer; what follows another text is text.
LLAMA_AUTO = CALLS | {"a text", "nothing", "a text and a call"}


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "smollm2"])
def test_a_grammar_allows_what_the_choice_of_tools_allows_and_nothing_else(name: str) -> None:
    tokenizer = tokenizer_of(name)
    markup = tool_markup(tokenizer)
    is_hermes = markup != LLAMA
    expected = {
        (True, True): CALLS | ({"two calls"} if is_hermes else set()),
        (True, False): CALLS,
        (False, True): HERMES_AUTO if is_hermes else LLAMA_AUTO,
        (False, False): (HERMES_AUTO - {"two calls"}) if is_hermes else LLAMA_AUTO,
    }
    for (needs_call, several), wanted in expected.items():
        grammar = markup.grammar(FUNCTIONS, needs_call=needs_call, several=several)
        found = {what for what, text in texts(markup).items() if accepts(tokenizer, grammar, text)}
        assert found == wanted, (needs_call, several)


def test_the_grammar_of_one_function_allows_no_other() -> None:
    tokenizer = tiny.tokenizer()
    markup = tool_markup(tokenizer)
    grammar = markup.grammar([STOP], needs_call=True, several=False)
    assert accepts(tokenizer, grammar, markup.call("stop-all", {}))
    assert not accepts(tokenizer, grammar, markup.call("get_weather", BERN))


@pytest.mark.parametrize("strict", [None, False, True])
def test_a_keyword_that_cannot_be_honoured_is_a_hint_unless_strict(strict: bool | None) -> None:
    odd: dict[str, Any] = {"type": "object", "properties": {}, "not": {"required": ["a"]}}
    given = copy.deepcopy(odd)
    function = {"name": "odd", "parameters": odd, "strict": strict}
    grammar = tool_markup(tiny.tokenizer()).grammar([function], needs_call=True, several=False)
    lark = LLMatcher.grammar_from_lark(grammar)
    matcher = LLMatcher(from_tokenizer(tiny.tokenizer()), lark, log_level=0)
    assert matcher.is_error() is bool(strict)
    assert odd == given, "the caller's schema has changed"
