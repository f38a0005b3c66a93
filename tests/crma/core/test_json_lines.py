"""crma.core.json_lines: every line is read or refused, and an error names its place."""

import pytest
from pydantic import BaseModel

from crma.core.errors import DataError
from crma.core.json_lines import Text, checked, read_lines


class Item(BaseModel):
    """A record of the test."""

    question: Text
    answers: list[Text] = []


def read(content: bytes) -> list[tuple[str, str]]:
    """(place, question) of each line."""
    lines = read_lines("file", content, Item.model_validate_json, DataError)
    return [(place, item.question) for place, item in lines]


def test_lines_are_counted_from_1_and_blank_ones_are_skipped() -> None:
    content = b'\xef\xbb\xbf{"question": "one"}\r\n\n  \n{"question": "two"}'
    assert read(content) == [("file line 1", "one"), ("file line 4", "two")]


def test_a_line_separator_inside_a_string_does_not_end_the_line() -> None:
    content = '{"question": "one\u2028two"}\n'.encode()
    assert read(content) == [("file line 1", "one\u2028two")]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b'{"question": " "}', "file line 2.question"),
        (b'{"question": "q", "answers": ["a", ""]}', "file line 2.answers[1]"),
        (b"{}", "file line 2.question"),
        (b"[1, 2", "file line 2"),
        (b"\xff", "file line 2"),
    ],
)
def test_an_error_names_the_line_and_the_path_inside_it(line: bytes, field: str) -> None:
    with pytest.raises(DataError) as caught:
        read(b'{"question": "one"}\n' + line)
    error = caught.value
    assert error.field == field
    assert error.message.startswith(f"{field}: ")
    assert "at line 1" not in error.message  # it would contradict the place


def test_an_item_that_stands_alone_is_named_by_its_path_or_as_fields() -> None:
    for item, field in (({"question": 1}, "question"), ("text", "fields")):
        with pytest.raises(DataError) as caught:
            checked("", item, Item.model_validate, DataError)
        assert caught.value.field == field


def test_a_long_value_is_cut() -> None:
    with pytest.raises(DataError) as caught:
        checked("", {"question": ["x" * 10_000] * 100}, Item.model_validate, DataError)
    assert len(str(caught.value.value)) < 200
