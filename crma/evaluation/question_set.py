"""Question sets: JSON Lines of questions with their accepted answers, checked field by field.

    {"id": "q1", "task": "medical", "question": "What is \\"Cholera\\"?", "answers": ["a disease"]}

The file is UTF-8 with one object per line; blank lines are ignored. The keys are id, task,
question, answers and, optionally, choices; no other key is allowed. Any fault is a ConfigError
whose field names the line (or the index, for questions given inline). No question is ever skipped.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from crma.core.errors import ConfigError
from crma.core.files import read_plain
from crma.core.json_lines import Text, checked, read_lines
from crma.evaluation.scorers import composed_length, has_words

MAX_ITEMS = 100_000
MAX_CHOICES = 26
MAX_ANSWERS = 1000  # of one question
MAX_ANSWER_CHARS = 10_000


def _comparable(answer: str) -> str:
    # Scorers normalise answers, which makes one character up to 18.
    length = composed_length(answer)
    if length > MAX_ANSWER_CHARS:
        raise ValueError(
            f"An answer has at most {MAX_ANSWER_CHARS} characters once Unicode's compatibility "
            f"forms are unified, not {length}"
        )
    # Scorers compare normalised texts, so no text could ever match an answer of punctuation alone.
    if not has_words(answer):
        raise ValueError("An answer needs a letter, digit or symbol")
    return answer


Answer = Annotated[str, Field(max_length=MAX_ANSWER_CHARS), AfterValidator(_comparable)]


class Question(BaseModel):
    """One item of a question set.

    Attributes:
        id: unique in its set.
        task: name of the task adapter that should know the answer.
        question: the prompt.
        answers: every answer that counts as right; among the choices, if there are any.
        choices: the texts that the choice scorers compare: none, or 2 to MAX_CHOICES of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text
    task: Text
    question: Text
    answers: Annotated[tuple[Answer, ...], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_ANSWERS
    )
    choices: tuple[Answer, ...] = Field((), max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _answers_are_choices(self) -> Self:
        if not self.choices:
            return self
        distinct = set(self.choices)
        has_duplicates = len(distinct) < len(self.choices)
        if len(distinct) < 2 or has_duplicates or not distinct.issuperset(self.answers):
            raise ValueError("choices must be two or more distinct texts that include every answer")
        return self


class QuestionsDigest:
    """The digest of questions that come one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"[")
        self._separator = b""

    def add(self, question: Question) -> None:
        """Take the next question."""
        content = question.model_dump(exclude_defaults=True)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self._hash.update(self._separator + canonical.encode())
        self._separator = b","

    @property
    def value(self) -> str:
        """`sha256:<hex>` of the questions so far, as one JSON list."""
        ended = self._hash.copy()
        ended.update(b"]")
        return f"sha256:{ended.hexdigest()}"


class QuestionIds:
    """The ids of a set, of which none may come twice. It holds hashes, however long the ids are."""

    def __init__(self) -> None:
        self._place_of: dict[bytes, str] = {}

    def add(self, place: str, question: Question) -> None:
        """Take the id of the question at a place. Raises ConfigError if it was used before."""
        key = hashlib.sha256(question.id.encode("utf-8", "surrogatepass")).digest()
        if key in self._place_of:
            message = f"{place}.id was already used at {self._place_of[key]}."
            field = f"{place}.id"
            allowed = "an id that no other question has"
            raise ConfigError(message, field=field, value=question.id, allowed=allowed)
        self._place_of[key] = place


def check_size(name: str, num_items: int) -> None:
    """Raises ConfigError for a set of no questions, or of more than MAX_ITEMS."""
    if not 1 <= num_items <= MAX_ITEMS:
        message = f"Question set {name!r} holds {num_items} questions."
        allowed = f"1 to {MAX_ITEMS}"
        raise ConfigError(message, field="questions", value=num_items, allowed=allowed)


@dataclass(frozen=True)
class QuestionSet:
    """Questions in order. Raises ConfigError unless there are 1 to MAX_ITEMS of them."""

    name: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        check_size(self.name, len(self.questions))

    @cached_property
    def digest(self) -> str:
        """The digest of these questions in this order, whatever the file's layout and name."""
        digest = QuestionsDigest()
        for question in self.questions:
            digest.add(question)
        return digest.value

    def for_tasks(self, tasks: Sequence[str]) -> "QuestionSet":
        """Return the questions of these tasks, in order.

        Raises:
            ConfigError: a task has no question.
        """
        known = list(dict.fromkeys(question.task for question in self.questions))
        for task in tasks:
            if task not in known:
                message = f"Question set {self.name!r} has no question for task {task!r}."
                raise ConfigError(message, field="tasks", value=task, allowed=known)
        questions = tuple(question for question in self.questions if question.task in tasks)
        return QuestionSet(self.name, questions)

    def describe(self) -> dict[str, Any]:
        """Return name, digest and number of items, by which reports refer to this set."""
        return {"name": self.name, "digest": self.digest, "items": len(self.questions)}


def read_question_set(path: Path) -> QuestionSet:
    """Read a set from a file, and name it after the file without its suffix.

    Raises:
        ConfigError: the file cannot be read, or as `parse_question_set`.
    """
    try:
        return parse_question_set(path.stem, read_plain(path))
    except OSError as error:
        message = f"Question set {path} cannot be read: {error.strerror}."
        allowed = "a readable file"
        raise ConfigError(
            message, field="question_set", value=str(path), allowed=allowed
        ) from error


def parse_question_set(name: str, lines: bytes) -> QuestionSet:
    """Parse a set from JSON Lines.

    Raises:
        ConfigError: its field is such as "public line 4" or "public line 4.answers[0]".
    """
    placed = read_lines(name, lines, Question.model_validate_json, ConfigError)
    return _with_unique_ids(name, placed)


def inline_question_set(items: Sequence[object], *, name: str = "inline") -> QuestionSet:
    """Make a set of parsed JSON objects.

    Raises:
        ConfigError: its field is such as "questions[3]" or "questions[3].answers[0]".
    """

    def placed() -> Iterator[tuple[str, Question]]:
        for i, item in enumerate(items):
            place = f"questions[{i}]"
            yield place, checked(place, item, Question.model_validate, ConfigError)

    return _with_unique_ids(name, placed())


def _with_unique_ids(name: str, placed: Iterable[tuple[str, Question]]) -> QuestionSet:
    """Make a set of (place, question). Raises ConfigError for an id that is used twice."""
    ids = QuestionIds()
    questions = []
    for place, question in placed:
        ids.add(place, question)
        questions.append(question)
    return QuestionSet(name, tuple(questions))
