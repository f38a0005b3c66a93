"""The body of /v1/responses: OpenAI's, as far as a server that keeps nothing can honour it.

A field at the value by which OpenAI's service would do nothing either is accepted. Any other value
of a field that this server cannot honour is refused by the field's name.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue

from crma.models.prompts import Conversation, Turn
from server.engine.request import Constraint, SamplingParams
from server.http.body import Body, InnerBody, at_most, example
from server.http.neutral_fields import Ignored, Neutral
from server.http.openai_message import MAX_MESSAGES
from server.http.sampling_fields import Temperature, TokenChoice
from server.http.structured_outputs import TextFormat

TEXT_PARTS = ("input_text", "output_text", "text")
Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
LOGPROBS = "message.output_text.logprobs"


def _join_parts(content: Any) -> Any:
    """The text of content in parts, as a message that was answered comes back; no other parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type") not in TEXT_PARTS:
            raise ValueError(
                "Input should be a text, or a list of parts of type input_text or output_text"
            )
        texts.append(text)
    return "".join(texts)


def _list_messages(value: Any) -> Any:
    """A text is one user message; other items than messages are refused."""
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("Input should be a text, or a list of messages, not empty")
    for item in value:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind != "message":
            raise ValueError("Input should be a text, or a list of items of type message")
    return value


class InputMessage(InnerBody):
    """A message of the conversation, from the user or as an earlier answer had it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    type: Literal["message"] = "message"
    id: Ignored = None  # nothing is kept under it
    status: Ignored = None
    phase: Ignored = None


class TextConfig(Body):
    """How the answer's text should be."""

    format: TextFormat = TextFormat()
    verbosity: Annotated[JsonValue, Neutral("medium")] = None


class ReasoningConfig(Body):
    """No model here reasons apart from its answer."""

    effort: Annotated[JsonValue, Neutral("none")] = None
    summary: Annotated[JsonValue, Neutral()] = None


class ResponseStreamOptions(Body):
    """Nothing is added to hide the length of a token."""

    include_obfuscation: Annotated[JsonValue, Neutral(False)] = None


class ResponsesRequest(TokenChoice):
    """OpenAI's response to a text or a conversation.

    Nothing is stored: `store` true and everything that refers to a stored response is refused.
    """

    model_config = example("/v1/responses")
    model: str = Field(
        description="`base` or `name[@version]`; `:crma-on` or `:crma-off` may follow."
    )
    input: Annotated[
        list[InputMessage],
        Field(fail_fast=True),
        Field(max_length=MAX_MESSAGES),
        BeforeValidator(_list_messages, json_schema_input_type=str | list[InputMessage]),
    ]
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; null: what is left of the context."
    )
    temperature: Temperature = 1
    include: Annotated[list[Includable], Field(fail_fast=True)] = Field(
        [], description="Log-probabilities of the tokens; of reasoning there is none to include."
    )
    top_logprobs: int = Field(
        0, ge=0, le=20, description=f"Most probable tokens to list with each; needs {LOGPROBS}."
    )
    stream_options: ResponseStreamOptions = ResponseStreamOptions()
    text: TextConfig = TextConfig()
    metadata: Annotated[dict[str, str], at_most(16)] = Field(
        {}, max_length=16, description="Comes back in the answer."
    )

    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    parallel_tool_calls: Ignored = None  # without tools there are no calls
    max_tool_calls: Ignored = None

    store: Annotated[JsonValue, Neutral(False)] = None
    previous_response_id: Annotated[JsonValue, Neutral()] = None
    conversation: Annotated[JsonValue, Neutral()] = None
    prompt: Annotated[JsonValue, Neutral()] = None
    background: Annotated[JsonValue, Neutral(False)] = None
    context_management: Annotated[JsonValue, Neutral([])] = None
    moderation: Annotated[JsonValue, Neutral()] = None
    tools: Annotated[JsonValue, Neutral([])] = None
    tool_choice: Annotated[JsonValue, Neutral("none", "auto")] = None
    truncation: Annotated[JsonValue, Neutral("disabled")] = None
    service_tier: Annotated[JsonValue, Neutral("auto", "default")] = None
    reasoning: ReasoningConfig = ReasoningConfig()

    def constraints(self) -> list[Constraint]:
        """As in `Structured`, and that of `text.format`."""
        formatted = self.text.format.constraint()
        return [*super().constraints(), *([] if formatted is None else [formatted])]

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has the log-probability of each token."""
        return LOGPROBS in self.include

    def sampling(self) -> SamplingParams:
        """How the tokens are chosen."""
        return self.chosen(
            max_tokens=self.max_output_tokens or 0,
            logprobs=self.top_logprobs if self.wants_logprobs else None,
        )

    def messages(self) -> Conversation:
        """Instructions and input. Templates know no developer: that is another name of system."""
        turns = [] if self.instructions is None else [Turn("system", self.instructions)]
        for message in self.input:
            role = "system" if message.role == "developer" else message.role
            turns.append(Turn(role, message.content))
        return Conversation(tuple(turns))
