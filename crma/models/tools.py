"""Tools: how a chat template writes calls of functions, and grammars of such calls.

Two forms are known. Hermes, Qwen and many others write
`<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`; Llama 3 writes
`{"name": …, "parameters": {…}}` and nothing else. A template that does not show tools at all gets
them in its system turn, in the words of Hermes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from crma.core.errors import ConfigError
from crma.models.json_schema import JSON_STYLE, closed
from crma.models.prompts import Conversation, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Function = Mapping[str, Any]
"""Name, description, parameters (a JSON schema) and strict, as OpenAI's `function` of a tool."""

_PROBE = {"name": "probe_name", "description": "probe_description", "parameters": {}}
_PROBE_ARGUMENTS = {"probe_key": 1}
_PROBE_CALL = {
    "id": "probe_id9",
    "type": "function",
    "function": {"name": "probe_name", "arguments": _PROBE_ARGUMENTS},
}
_ASKED = {"role": "user", "content": "probe"}
_CALLED = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

# The words of Hermes, which the templates of Qwen have too.
_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class ToolMarkup:
    """How calls are written.

    Attributes:
        begin: what stands before a call; "": an answer is one call, or a text without braces first.
        end: what stands after it.
        arguments: the key of the arguments.
        in_template: the chat template shows tools and renders calls.
        has_tokens: the tags of `begin` and `end` are tokens of their own.
    """

    begin: str
    end: str
    arguments: str
    in_template: bool = True
    has_tokens: bool = False

    def call(self, name: str, arguments: Any) -> str:
        """A call as the model would write it."""
        return (
            f"{self.begin}{self.head(name)}{json.dumps(arguments, ensure_ascii=False)}}}{self.end}"
        )

    def head(self, name: str) -> str:
        """The beginning of a call, up to its arguments."""
        return f'{{"name": {json.dumps(name)}, "{self.arguments}": '

    def conversation(self, given: Conversation, functions: Sequence[Function]) -> Conversation:
        """A conversation that shows the functions, for the chat template."""
        tools = tuple({"type": "function", "function": dict(each)} for each in functions)
        if self.in_template:
            return Conversation(given.turns, tools, given.template_kwargs)
        shown = "\n".join(json.dumps(each, ensure_ascii=False) for each in tools)
        system = _SYSTEM.format(tools=shown)
        turns = list(given.turns)
        if turns[0].role == "system":
            system = f"{turns.pop(0).content}\n\n{system}"
        plain = (self._plain(turn) for turn in turns)
        return Conversation((Turn("system", system), *plain), None, given.template_kwargs)

    def _plain(self, turn: Turn) -> Turn:
        """A turn as a template can render it that knows neither calls nor their results."""
        if turn.role == "tool":
            return Turn("user", f"<tool_response>\n{turn.content}\n</tool_response>")
        if not turn.tool_calls:
            return turn
        functions = [call["function"] for call in turn.tool_calls]
        calls = [self.call(each["name"], each["arguments"]) for each in functions]
        return Turn(turn.role, "\n".join([*([turn.content] if turn.content else []), *calls]))

    def grammar(self, functions: Sequence[Function], *, needs_call: bool, several: bool) -> str:
        """A grammar of answers, in llguidance's Lark notation.

        Args:
            functions: at least one: those that may be called.
            needs_call: an answer is calls; otherwise it may be a text, or a text and then calls.
            several: an answer may have more than one call, where the markup tells them apart.
        """
        rules = [f"f{i}: {self._rule(each)}" for i, each in enumerate(functions)]
        rules.append("call: " + " | ".join(f"f{i}" for i in range(len(functions))))
        begin, end = self._tag(self.begin), self._tag(self.end)
        more = f' ({end} "\\n" {begin} call)*' if several and self.begin else ""
        calls = f"call{more} {end}"
        if needs_call:
            return "\n".join([f"start: {begin} {calls}", *rules])
        if not self.begin:
            return "\n".join([f"start: | TEXT | {calls}", r"TEXT: /[^{\s](.|\n)*/", *rules])
        if self.has_tokens:  # which no text can be
            return "\n".join([f"start: TEXT? | TEXT? {begin} {calls}", r"TEXT: /(.|\n)+/", *rules])
        marker = self.begin.strip()
        text = rf"TEXT: /(.|\n)+/ & ~/(.|\n)*{marker}(.|\n)*/"
        before = rf"before[lazy]: /(.|\n)*{marker}/"
        return "\n".join([rf'start: | TEXT | before "\n" {calls}', text, before, *rules])

    def _tag(self, text: str) -> str:
        """The markup around a call in a grammar."""
        if not text or not self.has_tokens:
            return _quoted(text) if text else ""
        before, tag, after = text.partition(text.strip())
        return " ".join(
            [*([_quoted(before)] if before else []), tag, *([_quoted(after)] if after else [])]
        )

    def _rule(self, function: Function) -> str:
        """The rule of a call of one function, without the markup around it."""
        schema = dict(closed(function.get("parameters") or _NO_PARAMETERS))
        # As templates write JSON. Without `strict` a keyword that cannot be honoured is a hint, as
        # with OpenAI.
        schema["x-guidance"] = {**JSON_STYLE, "lenient": not function.get("strict")}
        return f'{_quoted(self.head(function["name"]))} %json {json.dumps(schema)} "}}"'


HERMES = ToolMarkup("<tool_call>\n", "\n</tool_call>", "arguments")
LLAMA = ToolMarkup("", "", "parameters")
GENERIC = ToolMarkup("<tool_call>\n", "\n</tool_call>", "arguments", in_template=False)


@lru_cache(maxsize=64)
def tool_markup(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> ToolMarkup:
    """Find out how a chat template writes calls, from what it makes of one.

    Args:
        template: None: the tokenizer's own.

    Raises:
        ConfigError: there is no template, or it writes calls in another form.
    """
    if not template and not tokenizer.chat_template:
        raise _unknown("the base model has no chat template")
    if not _shows_tools(tokenizer, template, [_ASKED]):
        return _with_tokens(GENERIC, tokenizer)
    try:
        shown = _render(tokenizer, template, [_ASKED, _CALLED])
    except Exception as error:  # a template may raise anything
        raise _unknown(f"the chat template refuses a tool call: {error}") from error
    for markup in (HERMES, LLAMA):
        if markup.call("probe_name", _PROBE_ARGUMENTS) in shown:
            return _with_tokens(markup, tokenizer)
    raise _unknown("the chat template writes tool calls in a form that this server does not know")


@lru_cache(maxsize=64)
def renders_calls(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> bool:
    """Whether a chat template shows the calls of a conversation that has no tools.

    True also where it refuses such a conversation: that refusal tells a client more.

    Args:
        template: None: the tokenizer's own.
    """
    try:
        shown = tokenizer.apply_chat_template(
            [_ASKED, _CALLED], chat_template=template, tokenize=False
        )
    except Exception:  # a template may raise anything
        return True
    return "probe_name" in str(shown)


def _with_tokens(markup: ToolMarkup, tokenizer: PreTrainedTokenizerBase) -> ToolMarkup:
    tags = {markup.begin.strip(), markup.end.strip()}
    return replace(markup, has_tokens=tags <= tokenizer.get_added_vocab().keys())


def _shows_tools(
    tokenizer: PreTrainedTokenizerBase, template: str | None, messages: list[dict[str, Any]]
) -> bool:
    try:
        return "probe_description" in _render(tokenizer, template, messages)
    except Exception as error:  # a template may raise anything
        raise _unknown(f"the chat template refuses tools: {error}") from error


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str | None, messages: list[dict[str, Any]]
) -> str:
    tools: list[Any] = [{"type": "function", "function": _PROBE}]
    return str(
        tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
    )


def _unknown(message: str) -> ConfigError:
    allowed = "the form of Hermes and Qwen, or of Llama 3; or a template that shows no tools"
    return ConfigError(f"tools: {message}", field="tools", value=None, allowed=allowed)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
