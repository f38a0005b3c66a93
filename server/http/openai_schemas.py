"""Bodies of the routes under /v1: OpenAI's, and their errors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from crma.models.prompts import Turn
from server.engine.request import SamplingParams
from server.http.body import Body, example
from server.http.sampling_fields import Sampled, Temperature


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _list_prompts(value: Any) -> Any:
    """A list of prompts, from one prompt or several.

    Checks the types here: pydantic's union would name each of its branches as a field.
    """
    is_several = isinstance(value, list) and value and not _is_token_ids(value)
    prompts = value if is_several else [value]
    for prompt in prompts:
        is_prompt = isinstance(prompt, str) or _is_token_ids(prompt)
        if not prompt or not is_prompt:
            raise ValueError(
                "Input should be a text or a list of token ids, not empty, "
                "or a list of such prompts"
            )
        if isinstance(prompt, str):
            prompt.encode()  # raises ValueError for half a surrogate pair
    return prompts


def _join_parts(content: Any) -> Any:
    """The text of a message that OpenAI's clients may send in parts; other parts are refused."""
    if not isinstance(content, list):
        return content
    for part in content:
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"}
        if not is_text or part["type"] != "text":
            raise ValueError('Input should be a text, or a list of {"type": "text", "text": …}')
    texts = [part["text"] for part in content]
    if not all(isinstance(text, str) for text in texts):
        return None  # which is no text: the field refuses it by name
    return "".join(texts)


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


class OpenAIRequest(Sampled):
    """The fields that OpenAI's generating routes have in common. Null counts as left out.

    A stream is one chunk a token, one with the finish_reason, and `[DONE]`; or a chunk with
    `error`.
    """

    drops_nulls = True

    model: str = Field(
        description="`base` or `name[@version]`; `:crma-on` or `:crma-off` may follow."
    )
    temperature: Temperature = 1
    stream_options: StreamOptions = StreamOptions()
    user: str | None = Field(
        None, description="Ignored, as its definition allows: it names the caller's user."
    )


class CompletionRequest(OpenAIRequest):
    """OpenAI's legacy completion.

    `prompt` is a text, a list of token ids, or a list of such prompts; it is never formatted.
    """

    model_config = example("/v1/completions")

    prompt: Prompts
    echo: bool = Field(False, description="Answer with the prompt before the text.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Most probable tokens to list with each token."
    )


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    type: Literal["text"] = Field("text", description="Ignored; lm-eval sends it.")


class ChatRequest(OpenAIRequest):
    """OpenAI's chat completion."""

    model_config = example("/v1/chat/completions")

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The newer name of max_tokens."
    )
    logprobs: bool = Field(False, description="Log-probability of every token.")
    top_logprobs: int = Field(
        0, ge=0, le=20, description="Most probable tokens to list with each; needs logprobs."
    )

    def turns(self) -> tuple[Turn, ...]:
        """The messages."""
        return tuple(Turn(each.role, each.content) for each in self.messages)

    def sampling(self, **more: int | bool | None) -> SamplingParams:
        """As in `Sampled`; max_completion_tokens replaces max_tokens where it is given."""
        if self.max_completion_tokens is not None:
            more["max_tokens"] = self.max_completion_tokens
        return super().sampling(**more)


class OpenAIErrorBody(BaseModel):
    """Errors of the routes under /v1: message, type, param (the field) and code."""

    error: dict[str, str | None]
