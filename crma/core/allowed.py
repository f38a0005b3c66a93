"""The values that a field takes, in words, from its JSON schema."""

from collections.abc import Mapping
from typing import Any


def describe(schema: Mapping[str, Any]) -> str:
    """The allowed values of a field: "an integer from 1 to 65535", "true or false".

    Args:
        schema: JSON schema of one field, as pydantic makes it. Nested objects are not described.
    """
    options = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if options:
        return " or ".join(map(describe, options))
    if "enum" in schema:
        return _listed(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "boolean":
        return "true or false"
    if kind == "integer":
        return f"an integer{_bounds(schema)}"
    if kind == "number":
        return f"a number{_bounds(schema)}"
    if kind == "array":
        least = " of 1 or more" if schema.get("minItems") else ""
        return f"a list{least}, each {describe(schema.get('items', {}))}"
    return _text(schema)


def _listed(values: list[Any]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    parts = []
    if low is not None:
        parts.append(f"of {low} or more")
    if above is not None:
        parts.append(f"above {above}")
    if high is not None:
        parts.append(f"of {high} or less")
    if below is not None:
        parts.append(f"below {below}")
    return f" {' and '.join(parts)}" if parts else ""


def _text(schema: Mapping[str, Any]) -> str:
    if schema.get("format") == "path":
        return "a path"
    if "pattern" in schema:
        return f"a text that matches {schema['pattern']}"
    return "a text that is not empty" if schema.get("minLength") else "a text"
