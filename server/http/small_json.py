"""JSON objects that are part of a request and whose size and depth are limited."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, JsonValue

from server.http.json_shape import shape_of

MAX_CHARS = 65_536  # as JSON; that is how long the source of a constraint may be, too
MAX_LEVELS = 100


def _check_small(value: Any) -> Any:
    """Raises ValueError for an object that takes long to work with."""
    if not isinstance(value, dict):
        return value
    text = json.dumps(value)
    if len(text) > MAX_CHARS:
        raise ValueError(
            f"Input should have at most {MAX_CHARS} characters as JSON, not {len(text)}"
        )
    depth = shape_of(text.encode()).depth
    if depth > MAX_LEVELS:
        raise ValueError(f"Input should nest at most {MAX_LEVELS} levels deep, not {depth}")
    return value


SmallJson = Annotated[dict[str, JsonValue], BeforeValidator(_check_small)]
"""An object of JSON of at most MAX_CHARS characters and MAX_LEVELS levels."""
