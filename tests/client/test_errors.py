import inspect
import re

import pytest
from crma_client import errors
from crma_client.errors import CrmaClientError, status_error, stream_error

CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
]


def test_all_errors_share_one_base_and_stand_in_the_docstring_as_they_derive() -> None:
    """The tree that the module shows is the tree there is."""
    path: list[str] = []
    shown = {}
    for prefix, name in re.findall(
        r"^([│ ├└─]*)(\w+)(?:\n| {2,})", errors.__doc__ or "", re.MULTILINE
    ):
        path = [*path[: len(prefix) // 4], name]
        shown[name] = path[-2] if len(path) > 1 else None
    real = {c.__name__: None if c is CrmaClientError else c.__bases__[0].__name__ for c in CLASSES}
    assert shown == real


def test_each_status_has_its_class_as_the_docstring_says_and_carries_what_the_server_said() -> None:
    table = re.findall(r"─ (\w+) +(\d{3}(?:, \d{3})*) ", errors.__doc__ or "")
    kinds = {int(status): name for name, statuses in table for status in statuses.split(", ")}
    assert len(kinds) == 10
    details = {"code": "c", "message": "m", "field": "task", "value": "x", "allowed": ["a"]}
    for status, name in {**kinds, 500: "StatusError"}.items():
        error = status_error(status, {"error": details}, "2")
        assert (type(error).__name__, str(error)) == (name, "m")
        assert vars(error) == {**details, "status": status, "retry_after": 2}
    assert status_error(429, None, "Fri, 31 Dec 1999 23:59:59 GMT").retry_after is None


@pytest.mark.parametrize("body", [None, [], "x", {}, {"error": "text"}, {"error": {"message": ""}}])
def test_a_body_that_is_not_the_contracts_still_gives_an_error_with_a_message(body: object) -> None:
    assert "502" in str(status_error(502, body, None))
    assert str(stream_error(body))
