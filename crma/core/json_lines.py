"""JSON Lines and parsed JSON, checked against a schema; every error names the place at fault."""

import reprlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ValidationError
from pydantic_core import ErrorDetails

from crma.core.errors import CrmaError

T = TypeVar("T")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("Text is blank")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


def read_lines(
    name: str, content: bytes, check: Callable[[bytes], T], refusal: type[CrmaError]
) -> Iterator[tuple[str, T]]:
    """Check every non-blank line of a JSON Lines file.

    Args:
        name: the file's name, for the places.
        content: the file's bytes; a byte order mark is ignored.
        check: parses one line, as pydantic's `model_validate_json` does.
        refusal: the error to raise for a line that `check` rejects; see `checked`.

    Yields:
        ("<name> line 4", record) for each line; lines are counted from 1, blank ones included.
    """
    # Split as bytes: str.splitlines() would also split at U+2028, which a JSON string may contain.
    lines = content.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{name} line {number}"
            yield place, checked(place, line, check, refusal)


def checked(place: str, item: Any, check: Callable[[Any], T], refusal: type[CrmaError]) -> T:
    """The result of pydantic's `check` on an item, with any failure turned into our own error.

    Args:
        place: where the item stands; "" for one that stands alone.
        item: the value, or the JSON bytes, to check.
        check: raises pydantic's ValidationError for an item that is not valid.
        refusal: the error to raise instead. It reports the first problem, and its field is `place`
            followed by the path inside the item.
    """
    try:
        return check(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = f"{place}{_path(first)}".removeprefix(".") or "fields"
        problem = _problem(first)
        shown = reprlib.repr(first["input"])  # short, however long or nested the input is
        message = f"{field}: {problem}."
        raise refusal(message, field=field, value=shown, allowed=problem) from error


def _path(error: ErrorDetails) -> str:
    """The path of pydantic's error inside the item, as `.answers[2]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    return "".join(parts)


def _problem(error: ErrorDetails) -> str:
    """Pydantic's message, without its prefix and without the line number, which is always 1."""
    message = error["msg"].removeprefix("Value error, ")
    return message.replace("at line 1 column", "at column")
