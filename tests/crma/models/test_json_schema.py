"""crma.models.json_schema: objects are closed where that shuts out nothing that they ask for."""

from typing import Any

import pytest

from crma.models.json_schema import closed

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}
CLOSED = {**POINT, "additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (POINT, CLOSED),
        ({"type": "array", "items": POINT}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [POINT, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        (
            {"$ref": "#/$defs/point", "$defs": {"point": POINT}},
            {"$ref": "#/$defs/point", "$defs": {"point": CLOSED}},
        ),
        (
            {"type": "object", "properties": {"p": POINT}},
            {"type": "object", "properties": {"p": CLOSED}, "additionalProperties": False},
        ),
        ({"allOf": [POINT]}, {"allOf": [CLOSED]}),
    ],
)
def test_an_object_that_names_its_properties_is_closed(given: Any, expected: Any) -> None:
    assert closed(given) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {**POINT, "additionalProperties": True},
        {**POINT, "patternProperties": {"^y": {}}},
        {**POINT, "anyOf": [{"required": ["x"]}, {"required": ["y"]}]},
        {"allOf": [POINT, {"type": "object", "properties": {"y": {}}}]},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}, POINT]}, "b": POINT}},
        {"type": "object"},
        {"enum": [{"properties": 1}], "const": {"properties": {}}},
        True,
        [1],
    ],
)
def test_what_would_shut_something_out_stays_as_it_is(schema: Any) -> None:
    assert closed(schema) == schema
