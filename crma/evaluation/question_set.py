"""Question sets: JSON Lines of {"id", "task", "question", "answers"} and "choices", checked field by field.

    {"id": "q1", "task": "medical", "question": "Which chapter has \\"Cholera\\"?", "answers": ["infectious diseases"]}

UTF-8, one object a line, blank lines ignored; no other key than these five, of which only the last may be missing.
Whatever is wrong is a ConfigError whose field names the line (or the index, for questions given inline), never a
question left out.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from crma.core.digests import bytes_digest
from crma.core.errors import ConfigError
from crma.core.json_lines import Text, checked, read_lines
from crma.evaluation.scorers import normalise

MAX_ITEMS = 10_000
MAX_CHOICES = 26


def _not_only_punctuation(answer: str) -> str:
    if not normalise(answer):  # scorers compare normalised texts: this answer could never be given
        raise ValueError("An answer needs a letter, digit or symbol")
    return answer


Answer = Annotated[str, AfterValidator(_not_only_punctuation)]


class Question(BaseModel):
    """One item: `task` names the adapter that should know, `answers` all that count as right; of `choices`, if any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text
    task: Text
    question: Text
    answers: tuple[Answer, ...] = Field(min_length=1)
    choices: tuple[Answer, ...] = Field((), max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _answers_are_choices(self) -> Self:
        choices = set(self.choices)
        if self.choices and not (
            len(choices) == len(self.choices) > 1 and choices.issuperset(self.answers)
        ):
            raise ValueError("choices are two or more, each once, and have every answer among them")
        return self


@dataclass(frozen=True)
class QuestionSet:
    """Questions in order: 1 to MAX_ITEMS of them, or it is a ConfigError."""

    name: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        count = len(self.questions)
        if not 1 <= count <= MAX_ITEMS:
            message = f"Question set {self.name!r} holds {count} questions."
            raise ConfigError(message, field="questions", value=count, allowed=f"1 to {MAX_ITEMS}")

    @cached_property
    def digest(self) -> str:
        """Identifies these questions in this order: not the file's layout, not the name."""
        content = [question.model_dump(exclude_defaults=True) for question in self.questions]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return bytes_digest(canonical.encode())

    def for_tasks(self, tasks: Sequence[str]) -> "QuestionSet":
        """The questions of these tasks, in order. ConfigError for a task without any."""
        known = list(dict.fromkeys(item.task for item in self.questions))
        for task in tasks:
            if task not in known:
                message = f"Question set {self.name!r} has no question for task {task!r}."
                raise ConfigError(message, field="tasks", value=task, allowed=known)
        return QuestionSet(self.name, tuple(item for item in self.questions if item.task in tasks))

    def describe(self) -> dict[str, Any]:
        """Name, digest and number of items: how reports refer to this set."""
        return {"name": self.name, "digest": self.digest, "items": len(self.questions)}


def read_question_set(path: Path) -> QuestionSet:
    """The set in the file, named after it without its suffix."""
    try:
        return parse_question_set(path.stem, path.read_bytes())
    except OSError as error:
        message = f"Question set {path} cannot be read: {error.strerror}."
        raise ConfigError(
            message, field="question_set", value=str(path), allowed="a readable file"
        ) from error


def parse_question_set(name: str, lines: bytes) -> QuestionSet:
    """The set in JSON Lines; ConfigError's field is "public line 4" or "public line 4.answers[0]"."""
    return _each_id_once(name, read_lines(name, lines, Question.model_validate_json, ConfigError))


def inline_question_set(items: Sequence[object], *, name: str = "inline") -> QuestionSet:
    """The same from parsed JSON objects; ConfigError's field is "questions[3]" or "questions[3].answers[0]"."""
    placed = ((f"questions[{i}]", item) for i, item in enumerate(items))
    return _each_id_once(
        name, ((at, checked(at, item, Question.model_validate, ConfigError)) for at, item in placed)
    )


def _each_id_once(name: str, placed: Iterable[tuple[str, Question]]) -> QuestionSet:
    found: dict[str, tuple[str, Question]] = {}
    for place, question in placed:
        if question.id in found:
            message = f"{place}.id was already used at {found[question.id][0]}."
            raise ConfigError(
                message,
                field=f"{place}.id",
                value=question.id,
                allowed="an id no other question has",
            )
        found[question.id] = (place, question)
    return QuestionSet(name, tuple(question for _, question in found.values()))
