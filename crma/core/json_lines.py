"""JSON Lines, and parsed JSON, as checked records: whatever is wrong is named by its place, never left out."""

import reprlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ValidationError

from crma.core.errors import CrmaError

T = TypeVar("T")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("Text is blank")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


def read_lines(
    name: str, content: bytes, check: Callable[[bytes], T], refusal: type[CrmaError]
) -> Iterator[tuple[str, T]]:
    """("<name> line 4", record) for each line that is not blank, counted from 1. Raises `refusal`; see `checked`."""
    # Split as bytes: str.splitlines() would also cut at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            place = f"{name} line {number}"
            yield place, checked(place, line, check, refusal)


def checked(place: str, item: Any, check: Callable[[Any], T], refusal: type[CrmaError]) -> T:
    """The item as pydantic's `check` returns it. Raises `refusal` whose field is `place` and the path inside it."""
    try:
        return check(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
        )
        field = f"{place}{path}".removeprefix(".") or "fields"
        wrong = (
            first["msg"].removeprefix("Value error, ").replace("at line 1 column", "at column")
        )  # it is one line
        shown = reprlib.repr(first["input"])  # cut short, however long or nested
        raise refusal(f"{field}: {wrong}.", field=field, value=shown, allowed=wrong) from error
