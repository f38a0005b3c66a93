"""Bodies of requests, and of the answers that /docs shows; OpenAI's are in openai_schemas.py.

They are strict: no unknown field, no number as text, no bool as number. Limits that are settings
(max_n, max_stop, request_timeout_s, …) are checked by the service, which knows the settings.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from crma.core.errors import ConfigError
from crma.core.selection import read_cell
from crma.evaluation.question_set import MAX_ANSWER_CHARS, MAX_ITEMS, Question
from crma.evaluation.scorers import SCORERS, composed_length
from server.http.body import Body, InnerBody, example
from server.http.sampling_fields import Sampled, Seed, Temperature
from server.http.small_json import SmallJson


def _check_variant(name: str) -> str:
    try:
        read_cell(name)
    except ConfigError as error:
        raise ValueError(f"Input should be a variant: {error.allowed}") from error
    return name


VariantName = Annotated[
    str,
    AfterValidator(_check_variant),
    Field(description="base, task, crma, task+crma; or of versions: task@v2+crma@v1."),
]


MAX_CHOICES = 1024  # as of a constraint


def _check_choices(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_CHOICES:
        raise ValueError(f"Input should have at most {MAX_CHOICES} texts, not {len(value)}")
    is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
    if is_list and max(map(composed_length, value), default=0) > MAX_ANSWER_CHARS:
        raise ValueError(f"Input should have texts of at most {MAX_ANSWER_CHARS} characters")
    if value != "own" and not (is_list and len(set(value)) == len(value) > 1):
        raise ValueError('Input should be two or more distinct texts, or "own"')
    return value


AblationChoices = Annotated[list[str] | Literal["own"], BeforeValidator(_check_choices)]


class GenerateRequest(Sampled):
    """One generation.

    `crma` null: on exactly if the task's adapter was trained with a CRMA backbone. A stream is
    `token` events, then `done` or `error`.
    """

    model_config = example("/generate")

    prompt: str = Field(
        min_length=1, description="One user turn; put through the adapter's prompt format."
    )
    task: str | None = Field(
        None, description="Task adapter: `name` or `name@version`; null: the base model."
    )
    format_of: str | None = Field(
        None,
        description="Put the prompt into the prompt format of this task, or of `base`, which asks "
        "variants alike; null: of `task`.",
    )
    temperature: Temperature = 0
    logprobs: bool = Field(
        False, description="Log-probability of every token, under the unmodified distribution."
    )
    top_logprobs: int = Field(
        0, ge=0, le=20, description="Most probable tokens to list with each; needs logprobs."
    )
    prompt_logprobs: bool = Field(
        False, description="Log-probabilities of the prompt's tokens; that of the first is null."
    )
    raw: bool = Field(
        False,
        description="Send the prompt as it is, without the prompt format; special tokens in it are "
        "recognised.",
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Of a raw prompt: begin with the token that the tokenizer adds; null: yes.",
    )


class QuestionBody(InnerBody, Question):
    """One item of an inline question set."""

    model_config = ConfigDict(strict=False)  # its answers are a tuple, which JSON does not have


class AblationRequest(Body):
    """Either `question_set` or `questions`. A variant named twice is a null run."""

    model_config = example("/ablation")

    question_set: str | None = Field(
        None, description="Name of a question set, such as `public`: GET /question_sets."
    )
    questions: Annotated[list[QuestionBody], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS
    )
    tasks: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=1024, description="Only the questions of these tasks."
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
    choices: AblationChoices | None = Field(
        None,
        description='Texts, one of which every answer has to be; "own": those of its question.',
    )
    timeout_s: float | None = Field(
        None, gt=0, description="Deadline of each item; null: the server's."
    )
    raw: bool = Field(
        False, description="Send the questions as they are, without the prompt format."
    )
    background: bool = Field(False, description="Answer at once with 202 and a status URL.")
    provenance: SmallJson | None = Field(
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
