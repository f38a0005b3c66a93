"""One question of a task with its answer, and the JSON Lines files that hold them."""

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


def _from_messages(line: object) -> object:
    """The prompt and the completion of a line that holds messages; any other line unchanged."""
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


_EXAMPLE: TypeAdapter[Example] = TypeAdapter(Annotated[Example, BeforeValidator(_from_messages)])


def read_jsonl(path: Path) -> list[Example]:
    """Examples from JSON Lines in TRL's conventions.

    A line is {"prompt": text, "completion": text}, the same with a list of one message each, or
    {"messages": [user, assistant]}. A message is {"role": ..., "content": text}. Blank lines and
    further fields are ignored. Training uses one user turn and one answer, so a longer
    conversation is refused.

    Raises:
        DataError: the file cannot be read or holds no example, or a line is wrong; then the
            message gives its number.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path} cannot be read: {error}."
        raise DataError(message, field="data", value=str(path)) from error
    lines = read_lines(path.name, content, _EXAMPLE.validate_json, DataError)
    examples = [example for _, example in lines]
    if not examples:
        message = f"{path} holds no examples."
        raise DataError(message, field="data", value=str(path), allowed="at least one line")
    return examples
