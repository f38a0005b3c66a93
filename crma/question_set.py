"""Question sets: JSON Lines of {"id", "task", "question", "answers"}, checked field by field.

    {"id": "q1", "task": "medical", "question": "Which chapter has \\"Cholera\\"?", "answers": ["infectious diseases"]}

UTF-8, one object a line, all four keys and no other, blank lines ignored. Whatever is wrong is a ConfigError whose
field names the line (or the index, for questions given inline), never a question left out.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from crma.errors import ConfigError
from crma.scorers import normalise

MAX_ITEMS = 10_000
_KEYS = ("id", "task", "question", "answers")
_SHOWN = 80  # characters of an offending value that an error repeats


@dataclass(frozen=True)
class Question:
    """One item: `task` names the adapter that should know, `answers` all that count as right."""

    id: str
    task: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Questions in order; `digest` identifies these questions (not the file's bytes, not the name)."""

    name: str
    digest: str
    questions: tuple[Question, ...]

    def for_tasks(self, tasks: Sequence[str]) -> QuestionSet:
        """The questions of these tasks, in order, under a digest of their own. ConfigError for a task without any."""
        known = tuple(dict.fromkeys(item.task for item in self.questions))
        for task in tasks:
            if task not in known:
                raise ConfigError(
                    f"Question set {self.name!r} has no question for task {_shown(task)!r}.",
                    field="tasks",
                    value=_shown(task),
                    allowed=list(known),
                )
        if not tasks:
            raise ConfigError("No task is named.", field="tasks", value=[], allowed=list(known))
        return _build(self.name, (item for item in self.questions if item.task in tasks))

    def describe(self) -> dict[str, Any]:
        """Name, digest and number of items: how reports refer to this set."""
        return {"name": self.name, "digest": self.digest, "items": len(self.questions)}


def read_question_set(path: Path, *, max_items: int = MAX_ITEMS) -> QuestionSet:
    """The set in the file, named after it without its suffix."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Question set {path} cannot be read: {error.strerror}.",
            field="question_set",
            value=str(path),
            allowed="a readable JSON Lines file",
        ) from error
    return parse_question_set(path.stem, content, max_items=max_items)


def parse_question_set(name: str, lines: bytes, *, max_items: int = MAX_ITEMS) -> QuestionSet:
    """The set in JSON Lines; ConfigError's field is "line 4" or "line 4: answers"."""
    return _build(name, _checked(_objects(lines), max_items))


def inline_question_set(items: Sequence[object], *, name: str = "inline", max_items: int = MAX_ITEMS) -> QuestionSet:
    """The same from parsed JSON objects; ConfigError's field is "questions[3]" or "questions[3].answers"."""
    places = (_Place(f"questions[{i}]", ".") for i in range(len(items)))
    return _build(name, _checked(zip(places, items, strict=True), max_items))


def _build(name: str, items: Iterable[Question]) -> QuestionSet:
    questions = tuple(items)
    if not questions:
        raise ConfigError(
            f"Question set {name!r} holds no question.", field="questions", value=0, allowed="at least one question"
        )
    # Keys sorted, no spaces: how the file was laid out does not matter, the order of the questions does.
    content = [asdict(question) for question in questions]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return QuestionSet(name, "sha256:" + hashlib.sha256(canonical.encode()).hexdigest(), questions)


class _Place(NamedTuple):
    """Where an item stands, and what parts that from the name of a field: "line 4" ": ", or "questions[3]" "."."""

    where: str
    joint: str

    def refusal(self, message: str, value: object, allowed: object, key: str = "") -> ConfigError:
        field = f"{self.where}{self.joint}{key}" if key else self.where
        return ConfigError(f"{field} {message}.", field=field, value=_shown(value), allowed=allowed)


def _objects(lines: bytes) -> Iterator[tuple[_Place, object]]:
    """The parsed JSON of each line that is not blank, and where it stands."""
    # Split as bytes: str.splitlines() would also cut at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(lines.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = _Place(f"line {number}", ": ")
        try:
            item = json.loads(line.decode("utf-8"), object_pairs_hook=partial(_unique_keys, place))
        except UnicodeDecodeError as error:
            wrong = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
            raise place.refusal("is not UTF-8", wrong, "UTF-8") from error
        except ConfigError:  # from _unique_keys; is a ValueError too
            raise
        except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, and integers over Python's limit
            raise place.refusal("is not JSON", line.decode("utf-8").strip(), "one JSON object") from error
        yield place, item


def _unique_keys(place: _Place, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise place.refusal("is given twice", value, "each key once", _shown(key))
        found[key] = value
    return found


def _checked(items: Iterable[tuple[_Place, object]], max_items: int) -> Iterator[Question]:
    first_seen: dict[str, str] = {}
    for count, (place, item) in enumerate(items, start=1):
        if count > max_items:
            raise place.refusal("is one question too many", count, f"at most {max_items} questions")
        question = _question(place, item)
        if question.id in first_seen:
            message = f"was already used at {first_seen[question.id]}"
            raise place.refusal(message, question.id, "an id that no other question has", "id")
        first_seen[question.id] = place.where
        yield question


def _question(place: _Place, item: object) -> Question:
    if not isinstance(item, dict):
        raise place.refusal("is not an object", item, f"an object with the keys {list(_KEYS)}")
    for key in item:
        if key not in _KEYS:
            raise place.refusal("is an unknown key", item[key], list(_KEYS), _shown(key))
    for key in _KEYS:
        if key not in item:
            raise place.refusal("is missing", None, list(_KEYS), key)
    answers = item["answers"]
    if not isinstance(answers, list) or not answers:
        raise place.refusal("is not a list of answers", answers, "a list of at least one text", "answers")
    return Question(
        id=_text(place, "id", item["id"]),
        task=_text(place, "task", item["task"]),
        question=_text(place, "question", item["question"]),
        answers=tuple(_answer(place, f"answers[{i}]", answer) for i, answer in enumerate(answers)),
    )


def _answer(place: _Place, key: str, value: object) -> str:
    answer = _text(place, key, value)
    if not normalise(answer):  # scorers compare normalised texts: this answer could never be given
        raise place.refusal("is nothing but punctuation", answer, "a text with a letter, digit or symbol", key)
    return answer


def _text(place: _Place, key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise place.refusal("is not a text, or is empty", value, "a text that is not empty", key)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's "\\ud800" parses, but could be neither hashed nor answered
        raise place.refusal("holds half of a surrogate pair", value, "text that UTF-8 can write", key) from error
    return value


def _shown(value: object) -> str:
    """The value as an error may repeat it: short, and always writable as UTF-8."""
    text = value if isinstance(value, str) else reprlib.repr(value)  # reprlib: nesting is cut, never a RecursionError
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return text.encode("utf-8", "backslashreplace").decode()
