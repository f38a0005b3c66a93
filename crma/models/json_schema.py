"""JSON schemas of answers, and how llguidance writes JSON.

Objects that do not say otherwise have no further properties. Without that a small model goes on
inventing properties until `max_tokens`. Answers to the closed schema satisfy the open one too.
xgrammar, vLLM's default, does the same ("strict mode").
"""

from collections.abc import Mapping
from typing import Any

JSON_STYLE = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""JSON as `json.dumps` writes it. Free whitespace costs a third of the tokens (decision 37)."""

_HOLD_ONE = ("items", "additionalProperties", "not", "if", "then", "else")
_HOLD_A_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_HOLD_BY_NAME = ("properties", "$defs", "definitions")
# Beside these other schemas speak of the same object: closing one of them would shut out the rest.
_SHARE_THE_OBJECT = (
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
    "if",
)


def closed(schema: Any) -> Any:
    """A copy of a schema whose objects have the properties that they name, and no others.

    Schemas with an `allOf` of several parts stay as they are: each part sees the whole object.

    Raises:
        RecursionError: it nests too deep.
    """
    return schema if _combines(schema) else _close(schema)


def _combines(schema: Any) -> bool:
    """Whether several schemas have to hold for one object."""
    if isinstance(schema, list):
        return any(_combines(each) for each in schema)
    if not isinstance(schema, Mapping):
        return False
    parts = schema.get("allOf")
    if isinstance(parts, list) and len(parts) > 1:
        return True
    return any(_combines(each) for each in schema.values())


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema  # true, false, or what the engine refuses
    result = dict(schema)
    for key in _HOLD_ONE:
        if key in result:
            result[key] = _close(result[key])
    for key in _HOLD_A_LIST:
        if isinstance(result.get(key), list):
            result[key] = [_close(each) for each in result[key]]
    for key in _HOLD_BY_NAME:
        if isinstance(result.get(key), Mapping):
            result[key] = {name: _close(each) for name, each in result[key].items()}
    if "properties" in result and not any(key in result for key in _SHARE_THE_OBJECT):
        result["additionalProperties"] = False
    return result
