"""Constraints of OpenAI's and vLLM's clients: what reaches the engine, and what is refused."""

import json
from typing import Any

import pytest
from api import Served, refused

from server.engine.request import Constraint, ConstraintKind

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
BAD = {"type": "object", "not": {}}
NAMED = {"name": "thing", "schema": SCHEMA, "strict": True}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "base", "prompt": "Hi"}
ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "Hi"},
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
}
OPENAI = ["/v1/completions", "/v1/chat/completions"]
LARK = 'start: "yes" | "no"'
STRUCTURED = [
    ({"choice": ["yes", "né"]}, ConstraintKind.CHOICE, ["yes", "né"]),
    ({"regex": "[0-9]+"}, ConstraintKind.REGEX, "[0-9]+"),
    ({"json": SCHEMA}, ConstraintKind.JSON_SCHEMA, SCHEMA),
    ({"json": json.dumps(SCHEMA)}, ConstraintKind.JSON_SCHEMA, SCHEMA),
    ({"json_object": True}, ConstraintKind.JSON_OBJECT, ""),
    ({"grammar": LARK}, ConstraintKind.GRAMMAR, LARK),
    ({"regex": "a", "choice": None, "json_object": False}, ConstraintKind.REGEX, "a"),
]
OLDER = [
    ({"guided_choice": ["yes", "né"]}, ConstraintKind.CHOICE, ["yes", "né"]),
    ({"guided_regex": "[0-9]+"}, ConstraintKind.REGEX, "[0-9]+"),
    ({"guided_json": SCHEMA}, ConstraintKind.JSON_SCHEMA, SCHEMA),
    ({"guided_grammar": LARK}, ConstraintKind.GRAMMAR, LARK),
    ({"response_format": {"type": "json_object"}}, ConstraintKind.JSON_OBJECT, ""),
    (
        {"response_format": {"type": "json_schema", "json_schema": NAMED}},
        ConstraintKind.JSON_SCHEMA,
        SCHEMA,
    ),
]


def nested(depth: int) -> dict[str, Any]:
    """A schema of arrays in arrays."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


async def constraint_of(served: Served, path: str, **fields: Any) -> Constraint | None:
    response = await served.client.post(path, json={**ROUTES[path], **fields})
    assert response.status_code == 200, response.text
    return served.engine.requests[-1].sampling.constraint


def content(constraint: Constraint) -> Any:
    """The source, read where it is JSON."""
    if constraint.kind in (ConstraintKind.CHOICE, ConstraintKind.JSON_SCHEMA):
        return json.loads(constraint.source)
    return constraint.source


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("asked", "kind", "source"), STRUCTURED)
async def test_structured_outputs_reach_the_engine_from_every_route(
    served: Served, path: str, asked: Any, kind: ConstraintKind, source: Any
) -> None:
    found = await constraint_of(served, path, structured_outputs=asked)
    assert found is not None
    assert (found.kind, content(found)) == (kind, source)


@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize(("fields", "kind", "source"), OLDER)
async def test_response_formats_and_the_older_names_reach_the_engine_from_openais_routes(
    served: Served, path: str, fields: Any, kind: ConstraintKind, source: Any
) -> None:
    found = await constraint_of(served, path, **fields)
    assert found is not None
    assert (found.kind, content(found)) == (kind, source)


@pytest.mark.parametrize("path", ROUTES)
async def test_empty_structured_outputs_allow_every_text(served: Served, path: str) -> None:
    for neutral in ({}, None, {"json_object": False}):
        assert await constraint_of(served, path, structured_outputs=neutral) is None


INVALID = [
    ("structured_outputs.regex", {"structured_outputs": {"regex": "(a"}}, "unclosed group"),
    ("structured_outputs.json", {"structured_outputs": {"json": BAD}}, "Unimplemented"),
    ("structured_outputs.json", {"structured_outputs": {"json": "{"}}, "line 1 column 2"),
    ("structured_outputs.json", {"structured_outputs": {"json": [1]}}, "schema"),
    ("structured_outputs.json", {"structured_outputs": {"json": nested(200)}}, "recursion limit"),
    ("structured_outputs.json", {"structured_outputs": {"json": nested(400)}}, "it nests too deep"),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "x"}}, "grammar"),
]
INVALID_OLDER = [
    ("guided_regex", {"guided_regex": "a(?=b)"}, "look-ahead"),
    ("guided_json", {"guided_json": {"type": "text"}}, "Invalid type"),
    ("guided_json", {"guided_json": [1]}, "schema"),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": nested(200)}}},
        "recursion limit",
    ),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": BAD}}},
        "Unimplemented",
    ),
]
CASES = [(path, *case) for path in ROUTES for case in INVALID]
CASES += [(path, *case) for path in OPENAI for case in INVALID_OLDER]


@pytest.mark.parametrize(("path", "field", "fields", "reason"), CASES)
async def test_what_is_no_constraint_is_a_400_that_names_field_and_reason(
    served: Served, path: str, field: str, fields: Any, reason: str
) -> None:
    body = {**ROUTES[path], **fields}
    error = await refused(served, 400, "invalid_constraint", path=path, json=body)
    assert error["param" if path in OPENAI else "field"] == field
    assert reason in error["message"]


SEVERAL = [
    {"structured_outputs": {"regex": "a", "choice": ["a"]}},
    {"structured_outputs": {"regex": "a"}, "guided_choice": ["a"]},
    {"guided_json": {}, "response_format": {"type": "json_object"}},
]


@pytest.mark.parametrize("fields", SEVERAL)
async def test_two_constraints_are_refused_by_both_names(served: Served, fields: Any) -> None:
    path = "/v1/chat/completions"
    error = await refused(served, 422, "invalid_field", path=path, json={**CHAT, **fields})
    assert error["param"] in error["message"]
    assert "is given too" in error["message"]


MALFORMED = [
    ({"structured_outputs": {"choice": []}}, "invalid_field", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [1]}}, "invalid_field", "structured_outputs.choice.0"),
    ({"structured_outputs": {"words": 1}}, "unknown_field", "structured_outputs.words"),
    (
        {"structured_outputs": {"json_schema": {}}},
        "unknown_field",
        "structured_outputs.json_schema",
    ),
    ({"response_format": {"type": "xml"}}, "invalid_field", "response_format.type"),
    (
        {"response_format": {"type": "json_schema"}},
        "invalid_field",
        "response_format.json_schema",
    ),
    (
        {"response_format": {"type": "text", "json_schema": NAMED}},
        "invalid_field",
        "response_format.json_schema",
    ),
]


@pytest.mark.parametrize(("fields", "code", "field"), MALFORMED)
async def test_a_malformed_constraint_is_refused_by_name(
    served: Served, fields: Any, code: str, field: str
) -> None:
    path = "/v1/chat/completions"
    error = await refused(served, 422, code, path=path, json={**CHAT, **fields})
    assert error["param"] == field
