"""The JSON object that a request is: strict, and unknown fields are refused by name."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

EXAMPLES: dict[str, Any] = json.loads(
    Path(__file__).with_name("examples.json").read_text(encoding="utf-8")
)
"""Requests and answers as /docs shows them, by path; a test compares them with real answers."""


def example(path: str) -> ConfigDict:
    """The model config that shows the example request of a path."""
    return ConfigDict(json_schema_extra={"examples": [EXAMPLES[path]["request"]]})


class Body(BaseModel):
    """A JSON object whose unknown fields are refused by name. A field that is null is left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        """Name an unknown field, and those that exist, before anything else is checked."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key in data:
            if key not in known:
                # Half a surrogate pair cannot be written into an answer.
                name = str(key).encode("utf-8", "backslashreplace").decode()
                context = {"key": name, "allowed": sorted(known)}
                raise PydanticCustomError("unknown_field", "unknown field", context)
        return {key: value for key, value in data.items() if value is not None}
