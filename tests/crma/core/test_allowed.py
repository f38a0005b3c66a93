"""crma.core.allowed: the values that a field takes, in words."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter

from crma.core.allowed import describe


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Annotated[int, Field(ge=1, le=65535)], "an integer from 1 to 65535"),
        (Annotated[int, Field(le=9)], "an integer of 9 or less"),
        (Annotated[int, Field(ge=1)] | None, "an integer of 1 or more"),
        (Annotated[float, Field(ge=0, lt=1)], "a number of 0 or more and below 1"),
        (Annotated[float, Field(gt=0)], "a number above 0"),
        (int, "an integer"),
        (bool, "true or false"),
        (Literal["a", "b", "c"], "a, b or c"),
        (Literal["a"], "a"),
        (Path, "a path"),
        (str, "a text"),
        (Annotated[str, Field(min_length=1)], "a text that is not empty"),
        (Annotated[str, Field(pattern="^x$")], "a text that matches ^x$"),
        (Annotated[list[int], Field(min_length=1)], "a list of 1 or more, each an integer"),
        (list[str] | int, "a list, each a text or an integer"),
    ],
)
def test_a_schema_in_words(kind: Any, words: str) -> None:
    assert describe(TypeAdapter(kind).json_schema()) == words
