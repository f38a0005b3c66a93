"""One question of a task and its answer, and the JSON Lines files that hold them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter

from crma.core.errors import DataError
from crma.core.json_lines import Text, read_lines


@dataclass(frozen=True)
class Example:
    """One question of a task and its answer."""

    prompt: Text
    completion: Text


def _turns(line: object) -> object:
    """Messages as the prompt and the completion that they are; what holds none stays, to be checked as it is."""
    match line:
        case {"prompt": [*prompt], "completion": [*completion]}:
            messages = [*prompt, *completion]
        case {"messages": messages}:
            pass
        case _:
            return line
    match messages:
        case [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]:
            return {"prompt": prompt, "completion": completion}
    raise ValueError("Expected one message of the user and one of the assistant")


_EXAMPLE: TypeAdapter[Example] = TypeAdapter(Annotated[Example, BeforeValidator(_turns)])


def read_jsonl(path: Path) -> list[Example]:
    """Examples from JSON Lines in TRL's conventions; blank lines are skipped, further fields are ignored.

    A line is {"prompt": text, "completion": text}, the same with one message each (a list of one {"role", "content"}),
    or {"messages": [user, assistant]}. Training sees one user turn and one answer, so anything longer is refused.
    Raises DataError with the line number.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error}.", field="data", value=str(path)
        ) from error
    examples = [
        example for _, example in read_lines(path.name, content, _EXAMPLE.validate_json, DataError)
    ]
    if not examples:
        raise DataError(
            f"{path} holds no examples.", field="data", value=str(path), allowed="at least one line"
        )
    return examples
