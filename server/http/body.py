"""The JSON object that a request is: strict, and unknown fields are refused by name."""

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

EXAMPLES: dict[str, Any] = json.loads(
    Path(__file__).with_name("examples.json").read_text(encoding="utf-8")
)
"""Requests and answers as /docs shows them, by path; a test compares them with real answers."""


def example(path: str) -> ConfigDict:
    """The model config that shows the example request of a path."""
    return ConfigDict(json_schema_extra={"examples": [EXAMPLES[path]["request"]]})


def at_most(count: int) -> BeforeValidator:
    """Annotates a list or object with `count` entries at most.

    They are counted before any is validated; pydantic counts those of an object last.
    """

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"Input should have at most {count} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


class Body(BaseModel):
    """A JSON object whose unknown fields are refused by name. A field that is null is left out.

    Every text in it, keys included, is one that UTF-8 can hold.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    checks_texts: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        """Name an unknown field, and those that exist, before anything else is checked."""
        if not isinstance(data, dict):
            return data
        known = _field_names(cls)
        for key in data:
            if key not in known:
                context = {"key": _escaped(str(key)), "allowed": sorted(known)}
                raise PydanticCustomError("unknown_field", "unknown field", context)
        if cls.checks_texts:
            _check_texts(data)
        return {key: value for key, value in data.items() if value is not None}


@cache
def _field_names(body: type[BaseModel]) -> frozenset[str]:
    """The fields of a body as clients write them."""
    return frozenset(field.alias or name for name, field in body.model_fields.items())


class InnerBody(Body):
    """A JSON object in a body, which has checked its texts."""

    checks_texts = False


def _check_texts(body: dict[Any, Any]) -> None:
    """Raises PydanticCustomError that has the place of a text with half a surrogate pair."""
    found = None if _is_surely_whole(body) else _find_broken_text(body)
    if found is not None:
        place, text = found
        context = {"place": [_escaped(name) for name in place], "text": _escaped(text)}
        message = "Input should be a text of whole characters, without half a surrogate pair"
        raise PydanticCustomError("broken_text", message, context)


def _is_surely_whole(body: dict[Any, Any]) -> bool:
    """Whether UTF-8 can hold all texts, found out ten times as fast as by looking at each.

    False also where that way cannot tell, as for JSON that is too deep for it.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _find_broken_text(body: dict[Any, Any]) -> tuple[list[str], str] | None:
    """A text that UTF-8 cannot hold, and the keys and positions that lead to it."""
    pending: list[tuple[_Place, Any]] = [(None, body)]
    while pending:
        place, container = pending.pop()
        is_object = isinstance(container, dict)
        for key, value in container.items() if is_object else enumerate(container):
            for text in (key, value):
                if isinstance(text, str) and not _is_whole(text):
                    return _names((place, key)), text
            if isinstance(value, dict | list):
                pending.append(((place, key), value))
    return None


_Place = tuple["_Place", str | int] | None
"""Where a value stands: its container's place, and its key or position there."""


def _names(place: _Place) -> list[str]:
    names = []
    while place is not None:
        place, key = place
        names.append(str(key))
    return names[::-1]


def _escaped(text: str) -> str:
    """A text as an answer can have it: half a surrogate pair is written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
