"""Bodies of requests, and of the answers that /docs shows.

They are strict: no unknown field, no number as text, no bool as number. Limits that are settings
(max_n, max_stop, request_timeout_s, …) are checked by the service, which knows the settings.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)
from pydantic_core import PydanticCustomError

from crma.core.errors import ConfigError
from crma.core.selection import read_cell
from crma.evaluation.question_set import MAX_ITEMS, Question
from crma.evaluation.scorers import SCORERS
from crma.models.prompts import Turn
from server.engine.request import SamplingParams

MAX_SEED = 2**53 - 1  # the largest integer that every JSON client keeps exact

EXAMPLES: dict[str, Any] = json.loads(
    Path(__file__).with_name("examples.json").read_text(encoding="utf-8")
)
"""Requests and answers as /docs shows them, by path; a test compares them with real answers."""


def _example(path: str) -> ConfigDict:
    """The model config that shows the example request of a path."""
    return ConfigDict(json_schema_extra={"examples": [EXAMPLES[path]["request"]]})


class _Body(BaseModel):
    """A JSON object whose unknown fields are refused by name.

    drops_nulls: a field that is null counts as left out.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    drops_nulls: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        """Name an unknown field, and those that exist, before anything else is checked."""
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                # Half a surrogate pair cannot be written into an answer.
                name = str(key).encode("utf-8", "backslashreplace").decode()
                context = {"key": name, "allowed": sorted(cls.model_fields)}
                raise PydanticCustomError("unknown_field", "unknown field", context)
        if not cls.drops_nulls:
            return data
        return {key: value for key, value in data.items() if value is not None}


def _check_temperature(temperature: float) -> float:
    if 0 < temperature < 0.01:
        raise ValueError("Input should be 0, or from 0.01 to 2")
    return temperature


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


def _list_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_variant(name: str) -> str:
    try:
        read_cell(name)
    except ConfigError as error:
        raise ValueError(f"Input should be a variant: {error.allowed}") from error
    return name


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


StopText = Annotated[str, Field(min_length=1, max_length=256)]
StopTexts = Annotated[
    list[StopText],
    BeforeValidator(_list_texts, json_schema_input_type=StopText | list[StopText]),
]
Prompt = str | list[int]
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_list_prompts, json_schema_input_type=Prompt | list[Prompt]),
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Temperature = Annotated[
    float,
    AfterValidator(_check_temperature),
    Field(ge=0, le=2, description="0, or from 0.01."),
]
VariantName = Annotated[
    str,
    AfterValidator(_check_variant),
    Field(description="base, task, crma, task+crma; or of versions: task@v2+crma@v1."),
]


class _Sampled(_Body):
    """The fields of every generating route."""

    crma: bool | None = Field(
        None, description="CRMA backbone on or off; null: as the adapter was trained."
    )
    max_tokens: int = Field(16, ge=1, description="Most tokens to generate.")
    top_p: float = Field(1.0, ge=1e-6, le=1)
    presence_penalty: float = Field(
        0, ge=-2, le=2, description="Subtracted from the logits of tokens that the answer has."
    )
    frequency_penalty: float = Field(
        0, ge=-2, le=2, description="The same, once for each time that the answer has them."
    )
    seed: Seed | None = Field(
        None, description="Answer i of n draws from seed + i; null: drawn, and in the answer."
    )
    n: int = Field(1, ge=1, description="Answers to draw.")
    stop: StopTexts = Field(
        [], description="Texts that end an answer and are not part of it; one, or a list."
    )
    stream: bool = Field(False, description="Answer as server-sent events.")
    ignore_eos: bool = Field(
        False, description="Go on to max_tokens past the end of the answer; for measurements."
    )

    def sampling(self, **more: int | bool | None) -> SamplingParams:
        """The fields that the engine knows by the same name, and `more` of its fields."""
        known = {each.name for each in dataclasses.fields(SamplingParams)}
        fields = self.model_dump(include=known)
        fields["stop"] = tuple(self.stop)
        return SamplingParams(**{**fields, **more})


class GenerateRequest(_Sampled):
    """One generation.

    `crma` null: on exactly if the task's adapter was trained with a CRMA backbone. A stream is
    `token` events, then `done` or `error`.
    """

    model_config = _example("/generate")

    prompt: str = Field(
        min_length=1, description="One user turn; put through the adapter's prompt format."
    )
    task: str | None = Field(
        None, description="Task adapter: `name` or `name@version`; null: the base model."
    )
    temperature: Temperature = 0
    top_k: int = Field(0, ge=0, description="0: off.")
    min_p: float = Field(
        0, ge=0, le=1, description="Least probability, as a share of the most probable token's."
    )
    repetition_penalty: float = Field(
        1, ge=0.01, le=2, description="Over tokens of prompt and answer; 1: off."
    )
    logprobs: bool = Field(
        False, description="Log-probability of every token, under the unmodified distribution."
    )
    top_logprobs: int = Field(
        0, ge=0, le=20, description="Most probable tokens to list with each; needs logprobs."
    )
    prompt_logprobs: bool = Field(
        False, description="Log-probabilities of the prompt's tokens; that of the first is null."
    )
    raw: bool = Field(False, description="Send the prompt as it is, without the prompt format.")
    timeout_s: float | None = Field(
        None, gt=0, description="Deadline of this request; null: the server's."
    )


class StreamOptions(_Body):
    """OpenAI's stream options; those that are not here are refused."""

    include_usage: bool = Field(
        False, description="The last chunk, without choices, has the usage; needs stream."
    )


class OpenAIRequest(_Sampled):
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

    model_config = _example("/v1/completions")

    prompt: Prompts
    echo: bool = Field(False, description="Answer with the prompt before the text.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Most probable tokens to list with each token."
    )


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    type: Literal["text"] = Field("text", description="Ignored; lm-eval sends it.")


class ChatRequest(OpenAIRequest):
    """OpenAI's chat completion."""

    model_config = _example("/v1/chat/completions")

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
        """As in `_Sampled`; max_completion_tokens replaces max_tokens where it is given."""
        if self.max_completion_tokens is not None:
            more["max_tokens"] = self.max_completion_tokens
        return super().sampling(**more)


class QuestionBody(_Body, Question):
    """One item of an inline question set."""

    model_config = ConfigDict(strict=False)  # its answers are a tuple, which JSON does not have


class AblationRequest(_Body):
    """Either `question_set` or `questions`. A variant named twice is a null run."""

    model_config = _example("/ablation")

    question_set: str | None = Field(
        None, description="Name of a question set, such as `public`: GET /question_sets."
    )
    questions: list[QuestionBody] | None = Field(None, min_length=1, max_length=MAX_ITEMS)
    tasks: list[str] | None = Field(
        None, min_length=1, description="Only the questions of these tasks."
    )
    variants: list[VariantName] = Field(default=["task+crma", "task"], min_length=1, max_length=8)
    scorer: str = Field("exact", description="One of " + ", ".join(SCORERS))
    tolerance: float = Field(0, ge=0, description="Absolute tolerance of the numeric scorer.")
    relative_tolerance: float = Field(
        0, ge=0, description="Relative tolerance of the numeric scorer, a share of |answer|."
    )
    max_tokens: int = Field(16, ge=1)
    temperature: Temperature = 0
    seed: Seed = Field(
        0,
        description="Seeds the bootstrap and, if temperature is above 0, each item.",
    )
    margin: float = Field(
        0.02, gt=0, lt=1, description="Difference within which two variants are equivalent."
    )
    repeat: bool = Field(
        False, description="Run variants of one selection apart instead of sharing results."
    )
    timeout_s: float | None = Field(
        None, gt=0, description="Deadline of each item; null: the server's."
    )
    background: bool = Field(False, description="Answer at once with 202 and a status URL.")
    provenance: dict[str, JsonValue] | None = Field(
        None, description="Of an earlier run: 409 if something has changed since."
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.question_set is None) == (self.questions is None):
            raise ValueError("give either question_set or questions")
        return self


class ErrorBody(BaseModel):
    """Errors of all routes but OpenAI's: code, message, field, value and allowed."""

    error: dict[str, Any]


class OpenAIErrorBody(BaseModel):
    """Errors of the routes under /v1: message, type, param (the field) and code."""

    error: dict[str, str | None]
