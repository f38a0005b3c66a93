"""The text of a large JSON value, made in pieces between which other threads can run."""

import json
from collections.abc import Iterator
from typing import Any

LEVELS = 5  # of an answer, down to the entries of its lists of log-probabilities

# As starlette's JSONResponse writes it.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_text(value: Any) -> bytes:
    """What JSONResponse makes of a value. json holds the interpreter's lock for as long as a value
    takes, which for 10 MB is most of a second.
    """
    return "".join(_pieces(value, LEVELS)).encode()


def _pieces(value: Any, levels: int) -> Iterator[str]:
    if levels == 0 or not isinstance(value, dict | list):
        yield _ENCODER.encode(value)
    elif isinstance(value, dict):
        yield from _joined("{}", (_field(*each, levels) for each in value.items()))
    else:
        yield from _joined("[]", (_pieces(each, levels - 1) for each in value))


def _field(name: str, value: Any, levels: int) -> Iterator[str]:
    yield f"{_ENCODER.encode(name)}:"
    yield from _pieces(value, levels - 1)


def _joined(brackets: str, parts: Iterator[Iterator[str]]) -> Iterator[str]:
    opening, closing = brackets[0], brackets[1]
    separator = opening
    for part in parts:
        yield separator
        yield from part
        separator = ","
    if separator == opening:
        yield opening
    yield closing
