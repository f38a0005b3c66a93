from __future__ import annotations

import inspect
import re

import pytest
from crma_client import errors
from crma_client.errors import CrmaClientError, status_error, stream_error

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


def test_all_errors_share_one_base_and_stand_in_the_docstring_as_they_derive() -> None:
    """The tree that the module shows is the tree there is."""
    path: list[str] = []
    shown = {}
    for prefix, name in re.findall(r"^([│ ├└─]*)(\w+)(?:\n| {2,})", errors.__doc__ or "", re.MULTILINE):
        path = [*path[: len(prefix) // 4], name]
        shown[name] = path[-2] if len(path) > 1 else None
    real = {c.__name__: None if c is CrmaClientError else c.__bases__[0].__name__ for c in CLASSES}
    assert shown == real


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequest),
        (401, errors.NotAuthorized),
        (403, errors.NotAuthorized),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (413, errors.InvalidRequest),
        (422, errors.InvalidRequest),
        (429, errors.Overloaded),
        (500, errors.StatusError),
        (503, errors.Unavailable),
        (504, errors.DeadlineExceeded),
    ],
)
def test_each_status_has_its_class_and_carries_what_the_server_said(status: int, kind: type[CrmaClientError]) -> None:
    details = {"code": "c", "message": "m", "field": "task", "value": "x", "allowed": ["a"]}
    error = status_error(status, {"error": details}, "1.5")
    assert type(error) is kind
    assert str(error) == error.message == "m"
    assert (error.status, error.code, error.field, error.value, error.allowed, error.retry_after) == (
        *(status, "c", "task", "x", ["a"]),
        1.5,
    )


@pytest.mark.parametrize("body", [None, [], "x", {}, {"error": "text"}, {"error": {"message": ""}}])
def test_a_body_that_is_not_the_contracts_still_gives_an_error_with_a_message(body: object) -> None:
    assert "502" in str(status_error(502, body, None))
    assert str(stream_error(body))


def test_a_retry_after_that_is_a_date_is_left_out() -> None:
    assert status_error(429, None, "Fri, 31 Dec 1999 23:59:59 GMT").retry_after is None


def test_an_invalid_argument_is_a_value_error() -> None:
    assert issubclass(errors.InvalidArgument, ValueError)
