"""Constraints on answers, as OpenAI's and vLLM's clients send them."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, SkipValidation

from server.engine.errors import InvalidConstraint
from server.engine.request import Constraint, ConstraintKind
from server.http.body import Body, InnerBody
from server.service.errors import InvalidField

# Not validated here: the engine reads a schema, and says what is wrong with it. pydantic's union
# would name its branches as fields, and refuse what nests deep.
JsonSchema = Annotated[dict[str, JsonValue] | bool, SkipValidation]
JsonSchemaOrText = Annotated[dict[str, JsonValue] | bool | str | None, SkipValidation]
Labels = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)]


class StructuredOutputs(InnerBody):
    """What the answer has to be: one of these, as vLLM names them."""

    choice: Labels | None = Field(None, description="One of these texts.")
    regex: str | None = Field(None, description="A text that matches all of this expression.")
    json_schema: JsonSchemaOrText = Field(
        None, alias="json", description="JSON of this schema, which may be a text itself."
    )
    json_object: bool = Field(False, description="Any JSON object.")
    grammar: str | None = Field(
        None, description="A text of this grammar, in Lark's notation or GBNF's."
    )


class Structured(Body):
    """The field of every generating route."""

    structured_outputs: StructuredOutputs = Field(
        StructuredOutputs(), description="What the answer has to be; {}: any text."
    )

    def constraints(self) -> list[Constraint]:
        """What this body asks the answer to be."""
        asked = self.structured_outputs
        found = [
            _choice(asked.choice, "structured_outputs.choice"),
            _source(ConstraintKind.REGEX, asked.regex, "structured_outputs.regex"),
            _json(asked.json_schema, "structured_outputs.json"),
            _source(ConstraintKind.GRAMMAR, asked.grammar, "structured_outputs.grammar"),
        ]
        if asked.json_object:
            field = "structured_outputs.json_object"
            found.append(Constraint(ConstraintKind.JSON_OBJECT, field=field))
        return [each for each in found if each is not None]

    def constraint(self) -> Constraint | None:
        """The one constraint. Raises InvalidField for several."""
        found = self.constraints()
        if len(found) > 1:
            names = [each.field for each in found]
            message = f"{names[1]}: {names[0]} is given too"
            raise InvalidField(message, field=names[1], value=names, allowed="one constraint")
        return found[0] if found else None


class NamedSchema(InnerBody):
    """OpenAI's name for a schema, and the schema."""

    name: str | None = Field(None, description="Ignored.")
    description: str | None = Field(None, description="Ignored.")
    json_schema: JsonSchema = Field({}, alias="schema", description="{}: any JSON value.")
    strict: bool | None = Field(
        None, description="Ignored: the answer keeps to the schema in any case."
    )


class ResponseFormat(InnerBody):
    """OpenAI's form of a constraint."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class TextFormat(NamedSchema):
    """The same in /v1/responses, where the schema stands beside its type."""

    type: Literal["text", "json_object", "json_schema"] = "text"

    def constraint(self) -> Constraint | None:
        """What the answer has to be; None: any text.

        Raises:
            InvalidField: a schema without the type json_schema, or the type without a schema.
        """
        has_schema = "json_schema" in self.model_fields_set
        if (self.type == "json_schema") != has_schema:
            message = "text.format.schema: goes with the type json_schema, and with no other"
            field = "text.format.schema"
            raise InvalidField(message, field=field, value=self.type, allowed="json_schema")
        if has_schema:
            return _json(self.json_schema, "text.format.schema")
        if self.type == "json_object":
            return Constraint(ConstraintKind.JSON_OBJECT, field="text.format")
        return None


class OpenAIStructured(Structured):
    """The fields of OpenAI's generating routes, with the older ones of vLLM."""

    response_format: ResponseFormat = Field(
        ResponseFormat(type="text"), description="What the answer has to be."
    )
    guided_json: JsonSchemaOrText = Field(
        None, description="The older name of structured_outputs.json."
    )
    guided_regex: str | None = Field(None, description="That of structured_outputs.regex.")
    guided_choice: Labels | None = Field(None, description="That of structured_outputs.choice.")
    guided_grammar: str | None = Field(None, description="That of structured_outputs.grammar.")

    def constraints(self) -> list[Constraint]:
        """As in `Structured`; raises InvalidField for a response format without its schema."""
        found = [
            _formatted(self.response_format),
            _choice(self.guided_choice, "guided_choice"),
            _source(ConstraintKind.REGEX, self.guided_regex, "guided_regex"),
            _json(self.guided_json, "guided_json"),
            _source(ConstraintKind.GRAMMAR, self.guided_grammar, "guided_grammar"),
        ]
        return [*super().constraints(), *(each for each in found if each is not None)]


def _formatted(asked: ResponseFormat) -> Constraint | None:
    """The constraint of a response format; None for any text."""
    schema = asked.json_schema
    if (asked.type == "json_schema") != (schema is not None):
        message = "response_format.json_schema: goes with the type json_schema, and with no other"
        field = "response_format.json_schema"
        allowed = '{"name": …, "schema": {…}} with the type json_schema'
        raise InvalidField(message, field=field, value=asked.type, allowed=allowed)
    if schema is not None:
        return _json(schema.json_schema, "response_format.json_schema.schema")
    if asked.type == "json_object":
        return Constraint(ConstraintKind.JSON_OBJECT, field="response_format")
    return None


def _choice(labels: list[str] | None, field: str) -> Constraint | None:
    return _source(ConstraintKind.CHOICE, None if labels is None else json.dumps(labels), field)


def _json(schema: Any, field: str) -> Constraint | None:
    """The constraint of a schema. Raises InvalidConstraint if JSON cannot be written so deep."""
    try:
        source = schema if schema is None or isinstance(schema, str) else json.dumps(schema)
    except RecursionError as error:
        message = f"{field}: it nests too deep"
        allowed = "a schema of fewer levels"
        raise InvalidConstraint(message, field=field, allowed=allowed) from error
    return _source(ConstraintKind.JSON_SCHEMA, source, field)


def _source(kind: ConstraintKind, source: str | None, field: str) -> Constraint | None:
    return None if source is None else Constraint(kind, source, field)
