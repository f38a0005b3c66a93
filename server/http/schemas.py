"""Bodies of requests, and what /docs shows of answers. Strict: no unknown field, no number as text, no bool as number.

Limits that are settings (max_n, max_stop, request_timeout_s, …) are checked where the settings are (`frontend.py`).
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

from crma.core.selection import read_cell
from crma.evaluation.question_set import MAX_ITEMS, Question
from crma.evaluation.scorers import SCORERS
from crma.models.prompts import Turn
from server.engine.request import SamplingParams

MAX_SEED = 2**53 - 1  # the largest integer that every JSON client keeps exact


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    nulls_left_out: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """A field that is not there is named first, with those that are."""
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                name = (
                    str(key).encode("utf-8", "backslashreplace").decode()
                )  # a lone surrogate cannot be reported
                context = {"key": name, "allowed": sorted(cls.model_fields)}
                raise PydanticCustomError("unknown_field", "unknown field", context)
        known = isinstance(data, dict) and cls.nulls_left_out
        return {key: value for key, value in data.items() if value is not None} if known else data


def _no_sliver(temperature: float) -> float:
    if 0 < temperature < 0.01:
        raise ValueError("Input should be 0, or from 0.01 to 2")
    return temperature


def _prompts(value: Any) -> Any:
    """The list of them. Refuses here what the union's branches would, where each would name itself as a field."""
    listed = (
        value
        if isinstance(value, list) and value and not all(type(v) is int for v in value)
        else [value]
    )
    for each in listed:
        if not each or not (
            isinstance(each, str) or (isinstance(each, list) and all(type(v) is int for v in each))
        ):
            raise ValueError(
                "Input should be a text or a list of token ids, not empty, or a list of such prompts"
            )
        if isinstance(each, str):
            each.encode()  # half a surrogate pair is a ValueError
    return listed


StopText = Annotated[str, Field(min_length=1, max_length=256)]
_listed = BeforeValidator(
    lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=StopText | list[StopText]
)
StopTexts = Annotated[list[StopText], _listed]
Prompt = str | list[int]
Prompts = Annotated[
    list[Prompt], BeforeValidator(_prompts, json_schema_input_type=Prompt | list[Prompt])
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Temperature = Annotated[
    float, AfterValidator(_no_sliver), Field(ge=0, le=2, description="0, or from 0.01.")
]

_CELLS = Field(description="base, task, crma, task+crma; or of versions: task@v2+crma@v1.")
VariantName = Annotated[str, AfterValidator(lambda name: read_cell(name) and name), _CELLS]

EXAMPLES: dict[str, Any] = json.loads(
    Path(__file__).with_name("examples.json").read_text(encoding="utf-8")
)
"""Requests and answers as /docs shows them, by path; a test compares their fields with those of real answers."""


class _Sampled(_Body):
    """What every generating route takes."""

    crma: bool | None = Field(
        None, description="CRMA backbone on or off; null: as the adapter was trained."
    )
    max_tokens: int = Field(16, ge=1, description="Most tokens to generate.")
    top_p: float = Field(1.0, ge=1e-6, le=1)
    presence_penalty: float = Field(
        0, ge=-2, le=2, description="Off the logits of tokens that the answer has."
    )
    frequency_penalty: float = Field(
        0, ge=-2, le=2, description="The same, as often as it has them."
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

    def sampling(self, **more: int | None) -> SamplingParams:
        """The fields that the engine knows by the same name, and `more`."""
        fields = self.model_dump(include={each.name for each in dataclasses.fields(SamplingParams)})
        return SamplingParams(**fields | {"stop": tuple(self.stop), **more})


class GenerateRequest(_Sampled):
    """One generation. `crma` null: on exactly if the task's adapter was trained with a CRMA backbone.

    A stream is `token` events, then `done` or `error`.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLES["/generate"]["request"]]})

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
        0, ge=0, le=20, description="As many most probable tokens with each; needs logprobs."
    )
    prompt_logprobs: bool = Field(
        False, description="The same of the prompt's tokens; of the first it is null."
    )
    raw: bool = Field(False, description="Send the prompt as it is, without the prompt format.")
    timeout_s: float | None = Field(
        None, gt=0, description="Deadline of this request; null: the server's."
    )


class StreamOptions(_Body):
    """OpenAI's; what else it may hold there is refused."""

    include_usage: bool = Field(
        False, description="The last chunk, without choices, has the usage; needs stream."
    )


class OpenAIRequest(_Sampled):
    """What OpenAI's generating routes have in common. What is not there is refused; null is as good as left out.

    A stream is a chunk a token, one with the finish_reason, and `[DONE]`; or a chunk with `error`.
    """

    nulls_left_out = True

    model: str = Field(
        description="`base` or `name[@version]`, with `:crma-on` or `:crma-off` after it, or `crma`."
    )
    temperature: Temperature = 1
    stream_options: StreamOptions = StreamOptions()
    user: str | None = Field(
        None, description="Ignored, as its definition allows: it names the caller's user."
    )


class CompletionRequest(OpenAIRequest):
    """OpenAI's legacy completion. `prompt` is a text or a list of token ids, or a list of such; never formatted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [EXAMPLES["/v1/completions"]["request"]]}
    )

    prompt: Prompts
    echo: bool = Field(False, description="Answer with the prompt before the text.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="As many most probable tokens with each token."
    )


def _joined(content: Any) -> Any:
    """The text of a message given in parts, as OpenAI's clients may; a part of another kind is refused."""
    if not isinstance(content, list):
        return content
    if not all(
        isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text"
        for p in content
    ):
        raise ValueError('Input should be a text, or a list of {"type": "text", "text": …}')
    return (
        "".join(part["text"] for part in content)
        if all(isinstance(p["text"], str) for p in content)
        else None
    )


class Message(_Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]
    type: Literal["text"] = Field("text", description="Ignored; lm-eval sends it.")


class ChatRequest(OpenAIRequest):
    """OpenAI's chat completion."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [EXAMPLES["/v1/chat/completions"]["request"]]}
    )

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The newer name of max_tokens."
    )
    logprobs: bool = Field(False, description="Log-probability of every token.")
    top_logprobs: int = Field(
        0, ge=0, le=20, description="As many most probable tokens with each; needs logprobs."
    )

    def turns(self) -> tuple[Turn, ...]:
        """The messages."""
        return tuple(Turn(each.role, each.content) for each in self.messages)

    def sampling(self, **more: int | None) -> SamplingParams:
        limit = self.max_completion_tokens
        return super().sampling(**more | ({} if limit is None else {"max_tokens": limit}))


class QuestionBody(_Body, Question):
    """One item of an inline question set."""

    model_config = ConfigDict(strict=False)  # its answers are a tuple, which JSON does not have


class AblationRequest(_Body):
    """Either `question_set` or `questions`. A variant named twice is a null run."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLES["/ablation"]["request"]]})

    question_set: str | None = Field(
        None, description="Name of a question set, such as `public`: GET /question_sets."
    )
    questions: list[QuestionBody] | None = Field(None, min_length=1, max_length=MAX_ITEMS)
    tasks: list[str] | None = Field(
        None, min_length=1, description="Only the questions of these tasks."
    )
    variants: list[VariantName] = Field(default=["task+crma", "task"], min_length=1, max_length=8)
    scorer: str = Field("exact", description="One of " + ", ".join(SCORERS))
    tolerance: float = Field(0, ge=0, description="Of numeric: |text - answer| at most this, or")
    relative_tolerance: float = Field(0, ge=0, description="at most this share of |answer|.")
    max_tokens: int = Field(16, ge=1)
    temperature: Temperature = 0
    seed: Seed = Field(
        0, description="Of the bootstrap; and of each item, where temperature is not 0."
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
    background: bool = Field(False, description="Answer at once with 202 and where to look.")
    provenance: dict[str, JsonValue] | None = Field(
        None, description="Of an earlier run: 409 if it is no longer this."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.question_set is None) == (self.questions is None):
            raise ValueError("give either question_set or questions")
        return self


class ServedModel(BaseModel):
    """The base model, and how it is served."""

    name: str
    digest: str
    dtype: str
    max_model_len: int


class ErrorBody(BaseModel):
    """Every error of the other routes: code, message, field, value and allowed."""

    error: dict[str, Any]


class OpenAIErrorBody(BaseModel):
    """Every error of the routes under /v1: message, type, param (the field) and code."""

    error: dict[str, str | None]
