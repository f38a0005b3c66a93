"""Tools as OpenAI's clients send them, and the calls of functions in an answer."""

import json
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue

from crma.models.tools import Function, ToolMarkup
from server.engine.request import Constraint, ConstraintKind
from server.http.body import Body, InnerBody
from server.http.small_json import MAX_CHARS, SmallJson
from server.service.errors import InvalidField

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 262_144  # as JSON
CHOICES = ("none", "auto", "required")


class FunctionBody(InnerBody):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: SmallJson | None = Field(
        None, description="JSON schema of its arguments; null: it has none."
    )
    strict: bool | None = Field(
        None,
        description="Refuse keywords of the schema that cannot be honoured; null: ignore them.",
    )


class Tool(InnerBody):
    """A tool; there are none but functions."""

    type: Literal["function"]
    function: FunctionBody


def _check_choice(value: Any) -> Any:
    if value in CHOICES:
        return value
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or value != {"type": "function", "function": {"name": name}}:
        raise ValueError(
            'Input should be "none", "auto", "required" or {"type": "function", '
            '"function": {"name": …}}'
        )
    return value


ToolChoice = Annotated[str | dict[str, JsonValue], BeforeValidator(_check_choice)]


def _check_tools(tools: Any) -> Any:
    """Raises ValueError for more than are worth validating, shown to the model or not."""
    num_chars = len(json.dumps(tools))
    if num_chars > MAX_TOOLS_CHARS:
        raise ValueError(
            f"Input should have at most {MAX_TOOLS_CHARS} characters as JSON, not {num_chars}"
        )
    return tools


class Tools(Body):
    """The fields of a chat that concern tools."""

    tools: Annotated[list[Tool], Field(fail_fast=True), BeforeValidator(_check_tools)] = Field(
        [], max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description='"none"; "auto", the default with tools: a text, or calls; "required": calls; '
        '{"type": "function", "function": {"name": …}}: a call of this one.',
    )
    parallel_tool_calls: bool | None = Field(
        None,
        description="Whether an answer may have several calls; null: unless a call is required, "
        "where small models repeat it.",
    )

    def shown_functions(self) -> list[Function]:
        """The functions that are shown to the model.

        Raises:
            InvalidField: `tool_choice` wants a function where there is none of that name; or the
                functions are too large together.
        """
        if self.tool_choice == "none":
            return []
        functions: list[Function] = [
            tool.function.model_dump(exclude_none=True) for tool in self.tools
        ]
        names: list[str] = [each["name"] for each in functions]
        is_forced = self.tool_choice not in (None, "auto")
        if is_forced and (not names or self._named not in (None, *names)):
            message = "tool_choice: no such function among the tools"
            value = self._named or self.tool_choice
            raise InvalidField(message, field="tool_choice", value=value, allowed=names)
        parameters = [each.get("parameters") for each in functions]
        num_chars = len(json.dumps(parameters))
        if num_chars > MAX_CHARS:
            message = "tools: the parameters of all functions are too large together"
            allowed = f"<= {MAX_CHARS} characters as JSON"
            raise InvalidField(message, field="tools", value=num_chars, allowed=allowed)
        return functions

    @property
    def _named(self) -> str | None:
        """The function that has to be called."""
        if not isinstance(self.tool_choice, dict):
            return None
        function: Any = self.tool_choice["function"]
        return str(function["name"])

    def tool_constraint(self, markup: ToolMarkup, functions: Sequence[Function]) -> Constraint:
        """What an answer to which these functions are shown has to be."""
        callable_ones = [each for each in functions if self._named in (None, each["name"])]
        needs_call = self.tool_choice not in (None, "auto")
        several = self.parallel_tool_calls
        if several is None:
            several = not needs_call
        grammar = markup.grammar(
            callable_ones, needs_call=needs_call, several=several and self._named is None
        )
        return Constraint(ConstraintKind.GRAMMAR, grammar, field="tools")


class ToolCallReader:
    """Reads one answer as it comes: its text, and then its calls.

    The answer keeps to the grammar of `markup`, but may end anywhere.

    Attributes:
        calls: the calls so far, in OpenAI's form.
    """

    def __init__(self, markup: ToolMarkup) -> None:
        self.calls: list[dict[str, Any]] = []
        self._markup = markup
        self._pending = ""  # not yet told apart
        self._arguments: _ArgumentsEnd | None = None  # in the arguments of the last call
        self._marker = markup.begin.strip() or "{"
        self._head = re.compile(rf'\s*\{{"name": "([^"]*)", "{markup.arguments}": ')
        self._has_text = False

    def read(self, text: str, *, is_last: bool = False) -> list[dict[str, Any]]:
        """Take more text.

        Args:
            is_last: no more follows, so that nothing has to be held back.

        Returns:
            What it adds to the message: `{"content": …}`, or `{"tool_calls": […]}`.
        """
        self._pending += text
        deltas: list[dict[str, Any]] = []
        while True:
            delta = self._next(is_last=is_last)
            if delta is None:
                return deltas
            deltas.append(delta)

    def _next(self, *, is_last: bool) -> dict[str, Any] | None:
        if self._arguments is not None:
            return self._more_arguments(self._arguments)
        if self.calls or self._at_call():
            return self._begin_call()
        return self._more_text(is_last=is_last)

    def _at_call(self) -> bool:
        """Whether a call begins here; of a markup without marker only a whole answer is one."""
        return self._pending.lstrip().startswith(self._marker) and not (
            self._has_text and not self._markup.begin
        )

    def _more_text(self, *, is_last: bool) -> dict[str, Any] | None:
        """The text before the first call, without white space that may belong to the markup."""
        pending = self._pending
        length = len(pending)
        if self._markup.begin or not self._has_text:
            found = pending.find(self._marker)
            if found >= 0 and self._markup.begin:
                length = found
            elif not is_last:
                length -= _overlap(pending, self._marker)
        if not is_last:
            length = len(pending[:length].rstrip())
        if length == 0:
            return None
        self._pending = pending[length:]
        self._has_text = True
        return {"content": pending[:length]}

    def _begin_call(self) -> dict[str, Any] | None:
        """The name of the next call, once it is complete."""
        match = self._head.search(self._pending)
        if match is None:
            return None
        self._pending = self._pending[match.end() :]
        self._arguments = _ArgumentsEnd()
        call = {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": match[1], "arguments": ""},
        }
        self.calls.append(call)
        return {"tool_calls": [{"index": len(self.calls) - 1, **_copied(call)}]}

    def _more_arguments(self, arguments: "_ArgumentsEnd") -> dict[str, Any] | None:
        """The next piece of the arguments of the last call."""
        length = arguments.find(self._pending)
        piece = self._pending[:length]
        self._pending = self._pending[length:]
        if arguments.is_over:
            self._arguments = None
        if not piece:
            return None if self._arguments is not None else self._next(is_last=False)
        self.calls[-1]["function"]["arguments"] += piece
        delta = {"index": len(self.calls) - 1, "function": {"arguments": piece}}
        return {"tool_calls": [delta]}


class _ArgumentsEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._in_text = False
        self._is_escaped = False

    def find(self, piece: str) -> int:
        """How much of the next piece belongs to the object."""
        for position, character in enumerate(piece):
            if self._in_text:
                self._pass_text(character)
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_over = True
                    return position + 1
        return len(piece)

    def _pass_text(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_text = False


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of a text with which the marker begins."""
    lengths = range(min(len(text), len(marker)), 0, -1)
    return next((each for each in lengths if marker.startswith(text[-each:])), 0)


def _copied(call: dict[str, Any]) -> dict[str, Any]:
    """A call that later arguments do not change."""
    copied: dict[str, Any] = json.loads(json.dumps(call))
    return copied
