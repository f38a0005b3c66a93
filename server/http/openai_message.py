"""A message of a conversation, as clients of OpenAI send it, our own answers included."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator

from crma.models.prompts import Turn
from server.http.body import InnerBody
from server.http.neutral_fields import Ignored, Neutral

MAX_MESSAGES = 2048  # of a conversation, as with OpenAI
MAX_TOOL_CALLS = 128  # of a message
TEXT = 'a text, or a list of {"type": "text", "text": …}'
# Beside its text, a part may say where a cached prompt ends, which changes no answer.
TEXT_PART = {"type", "text", "prompt_cache_breakpoint", "cache_control"}


def _join_parts(content: Any) -> Any:
    """The text of a message that may come in parts; other parts than text are refused."""
    if not isinstance(content, list):
        return content
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str) or not part.keys() <= TEXT_PART:
            raise ValueError(f"Input should be {TEXT}")
    return "".join(part["text"] for part in content)


class FunctionCall(InnerBody):
    """The function of a tool call, and the JSON of its arguments."""

    name: str = Field(min_length=1)
    arguments: str
    parsed_arguments: Ignored = None  # OpenAI's client sends back what it has parsed

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        if not isinstance(_read_json(arguments or "{}"), dict):
            raise ValueError("Input should be the JSON of an object")
        return arguments

    def for_template(self) -> dict[str, Any]:
        """Name and arguments as chat templates read them: the arguments are an object."""
        return {"name": self.name, "arguments": _read_json(self.arguments or "{}")}


class ToolCall(InnerBody):
    """A call of a function by the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored = None  # as streams have it

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates read it."""
        return {"id": self.id, "type": self.type, "function": self.function.for_template()}


class Message(InnerBody):
    """One turn of a conversation.

    What an assistant's message of OpenAI may have beside text (a refusal, audio, citations) is
    taken where it is empty, as it is in our own answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is another name of system."
    )
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] = Field(
        [], max_length=MAX_TOOL_CALLS, description="Of an assistant's message."
    )
    content: str | None = Field(
        None,
        validate_default=True,
        description="A text, or a list of text parts; null only beside tool_calls.",
    )
    name: str | None = Field(None, description="Tells speakers of one role apart.")
    tool_call_id: str | None = Field(None, description="The call that a tool's message answers.")
    type: Literal["text"] = Field("text", description="Ignored; lm-eval sends it.")
    parsed: Ignored = None  # OpenAI's client sends back what it has parsed

    refusal: Annotated[JsonValue, Neutral("")] = None
    annotations: Annotated[JsonValue, Neutral([])] = None
    audio: Annotated[JsonValue, Neutral()] = None
    function_call: Annotated[JsonValue, Neutral()] = None
    reasoning: Annotated[JsonValue, Neutral("")] = None
    reasoning_content: Annotated[JsonValue, Neutral("")] = None
    provider_specific_fields: Annotated[JsonValue, Neutral({})] = None

    @field_validator("tool_calls")
    @classmethod
    def _check_tool_calls(cls, calls: list[ToolCall], info: ValidationInfo) -> list[ToolCall]:
        if calls and info.data.get("role") != "assistant":
            raise ValueError("Input should be null unless role is assistant")
        return calls

    @field_validator("content", mode="before")
    @classmethod
    def _read_content(cls, content: Any, info: ValidationInfo) -> Any:
        is_optional = info.data.get("role") == "assistant" and info.data.get("tool_calls")
        text = _join_parts(content)
        if text is None and not is_optional:
            raise ValueError(f"Input should be {TEXT}")
        return text

    @field_validator("tool_call_id")
    @classmethod
    def _check_tool_call_id(cls, call_id: str | None, info: ValidationInfo) -> str | None:
        if call_id is not None and info.data.get("role") != "tool":
            raise ValueError("Input should be null unless role is tool")
        return call_id

    def turn(self) -> Turn:
        """The message as chat templates read it."""
        return Turn(
            "system" if self.role == "developer" else self.role,
            self.content,
            name=self.name,
            tool_calls=tuple(call.for_template() for call in self.tool_calls) or None,
            tool_call_id=self.tool_call_id,
        )


def _read_json(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or deeper than Python reads
        return None
