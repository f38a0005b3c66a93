"""server.http.json_shape: how deep JSON nests, and how much it holds."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.http.json_shape import shape_of

SCALARS = st.none() | st.booleans() | st.integers() | st.text(alphabet='[]{}"\\a\n')
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='[{"\\'), inner),
    max_leaves=8,
)


def counted(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(counted, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(counted, value), default=0)
    return 0


def containers(value: Any) -> list[Any]:
    members = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(members, list):
        return []
    inner = [each for member in members for each in containers(member)]
    return [value, *inner]


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_it_is_the_number_of_containers_in_one_another_and_in_all(value: Any) -> None:
    text = json.dumps(value).encode()
    assert shape_of(text) == (counted(value), len(containers(value)))


@given(st.binary() | st.text(alphabet='[]{}"\\a').map(str.encode))
def test_any_bytes_have_a_shape(text: bytes) -> None:
    depth, size = shape_of(text)
    assert 0 <= depth <= size <= len(text)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (b"", (0, 0)),
        (b"[" * 7, (7, 7)),
        (b"]" * 7, (0, 0)),
        (b'{"a": [', (2, 2)),
        (b'["[[[', (1, 1)),
        (rb'["\"[[", []]', (2, 2)),
        (rb'["\\",[]]', (2, 2)),
    ],
)
def test_of_a_text_that_is_no_json_it_is_that_of_its_brackets(
    text: bytes, shape: tuple[int, int]
) -> None:
    assert shape_of(text) == shape


def test_a_deep_text_and_a_long_one_are_no_trouble() -> None:
    assert shape_of(b"[" * 500_000 + b"]" * 500_000) == (500_000, 500_000)
    assert shape_of(b'"' + b"[" * 1_000_000 + b'"') == (0, 0)
    assert shape_of(b'"' + b"\\\\" * 500_000 + b'"') == (0, 0)
