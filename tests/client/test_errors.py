"""The error classes, the tree that their module documents, and errors built from an answer."""

import inspect
import re

import pytest
from crma_client import errors
from crma_client.errors import CrmaClientError, status_error, stream_error

CLASSES = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if member.__module__ == errors.__name__
]


def test_the_docstring_shows_the_tree_of_error_classes() -> None:
    lines = re.findall(r"^([│ ├└─]*)(\w+)(?:\n| {2,})", errors.__doc__ or "", re.MULTILINE)
    path: list[str] = []
    shown = {}
    for indentation, name in lines:
        path = [*path[: len(indentation) // 4], name]
        shown[name] = path[-2] if len(path) > 1 else None
    actual = {member.__name__: member.__bases__[0].__name__ for member in CLASSES}
    assert shown == actual | {CrmaClientError.__name__: None}


def test_each_status_raises_the_class_of_the_docstring_with_the_servers_details() -> None:
    table = re.findall(r"─ (\w+) +(\d{3}(?:, \d{3})*) ", errors.__doc__ or "")
    names = {int(status): name for name, statuses in table for status in statuses.split(", ")}
    assert len(names) == 10
    details = {"code": "c", "message": "m", "field": "task", "value": "x", "allowed": ["a"]}
    for status, name in {**names, 500: "StatusError"}.items():
        error = status_error(status, {"error": details}, "2")
        assert type(error).__name__ == name
        assert str(error) == "m (allowed: ['a'])"
        assert vars(error) == {**details, "status": status, "retry_after": 2}


def test_a_retry_after_that_is_a_date_is_ignored() -> None:
    assert status_error(429, None, "Fri, 31 Dec 1999 23:59:59 GMT").retry_after is None


@pytest.mark.parametrize("body", [None, [], "x", {}, {"error": "text"}, {"error": {"message": ""}}])
def test_a_body_in_another_format_still_gives_an_error_with_a_message(body: object) -> None:
    assert "502" in str(status_error(502, body, None))
    assert str(stream_error(body))


def test_an_error_prints_what_is_allowed_unless_its_message_does() -> None:
    """A task that was not found told nobody which tasks there are."""

    def printed(message: str, allowed: object) -> str:
        return str(status_error(404, {"error": {"message": message, "allowed": allowed}}, None))

    assert printed("no task 'x'", ["legal", "medical"]) == (
        "no task 'x' (allowed: ['legal', 'medical'])"
    )
    assert printed("n: at most 8", "at most 8") == "n: at most 8"
    assert printed("no such job", None) == "no such job"
    assert printed("use it with CRMA off", False) == "use it with CRMA off (allowed: False)"
