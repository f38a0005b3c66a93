"""Bodies of the routes under /v1: OpenAI's, and their errors."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from crma.models.prompts import Conversation
from server.http.body import Body, example
from server.http.neutral_fields import (
    Neutral,
    NeutralChatFields,
    NeutralCompletionFields,
    NeutralFields,
)
from server.http.openai_message import MAX_MESSAGES, Message
from server.http.sampling_fields import Sampled, Temperature
from server.http.small_json import SmallJson
from server.http.structured_outputs import OpenAIStructured
from server.http.tool_calls import Tools

MAX_PROMPTS = 2048


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _list_prompts(value: Any) -> Any:
    """A list of prompts, from one prompt or several.

    Checks the types here: pydantic's union would name each of its branches as a field.
    """
    is_several = isinstance(value, list) and value and not _is_token_ids(value)
    if is_several and len(value) > MAX_PROMPTS:
        raise ValueError(f"Input should have at most {MAX_PROMPTS} prompts, not {len(value)}")
    prompts = value if is_several else [value]
    for prompt in prompts:
        is_prompt = isinstance(prompt, str) or _is_token_ids(prompt)
        if not prompt or not is_prompt:
            raise ValueError(
                "Input should be a text or a list of token ids, not empty, "
                "or a list of such prompts"
            )
    return prompts


Prompt = str | list[int]
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_list_prompts, json_schema_input_type=Prompt | list[Prompt]),
]


class StreamOptions(Body):
    """OpenAI's stream options; those that are not here are refused."""

    include_usage: bool = Field(
        False, description="The last chunk, without choices, has the usage; needs stream."
    )
    continuous_usage_stats: bool = Field(
        False, description="Every chunk has the usage so far; vLLM's."
    )
    include_obfuscation: Annotated[JsonValue, Neutral(False)] = None


class OpenAIRequest(NeutralFields, OpenAIStructured, Sampled):
    """The fields that OpenAI's generating routes have in common.

    A stream is one chunk a token, one with the finish_reason, and `[DONE]`; or a chunk with
    `error`.
    """

    model: str = Field(
        description="`base` or `name[@version]`; `:crma-on` or `:crma-off` may follow."
    )
    temperature: Temperature = 1
    stream_options: StreamOptions = StreamOptions()


class CompletionRequest(NeutralCompletionFields, OpenAIRequest):
    """OpenAI's legacy completion.

    `prompt` is a text, a list of token ids, or a list of such prompts; it is never formatted.
    """

    model_config = example("/v1/completions")

    prompt: Prompts
    max_tokens: int | None = Field(
        16, ge=0, description="Most tokens to generate; 0 only with echo."
    )
    best_of: int | None = Field(None, ge=1, description="Has to be n: every answer is returned.")
    add_special_tokens: bool = Field(
        True, description="Begin a text with the token that the tokenizer adds, if any; vLLM's."
    )
    echo: bool = Field(False, description="Answer with the prompt before the text.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Most probable tokens to list with each token."
    )


class ChatRequest(NeutralChatFields, Tools, OpenAIRequest):
    """OpenAI's chat completion."""

    model_config = example("/v1/chat/completions")

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; null: what is left of the context."
    )
    logprobs: bool = Field(False, description="Log-probability of every token.")
    top_logprobs: int = Field(
        0, ge=0, le=20, description="Most probable tokens to list with each; needs logprobs."
    )

    chat_template_kwargs: SmallJson = Field(
        {}, description="Further variables of the chat template, such as enable_thinking."
    )

    def conversation(self) -> Conversation:
        """Everything that the chat template is given."""
        turns = tuple(message.turn() for message in self.messages)
        return Conversation(turns, template_kwargs=self.chat_template_kwargs)


class OpenAIErrorBody(BaseModel):
    """Errors of the routes under /v1: message, type, param (the field) and code."""

    error: dict[str, str | None]
