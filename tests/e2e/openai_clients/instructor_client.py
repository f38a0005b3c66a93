"""instructor: a typed answer by tools, by JSON schema and by JSON."""

import sys
from typing import Literal

import instructor
import openai
from instructor.core.exceptions import IncompleteOutputException
from pydantic import BaseModel

ADDRESS, MODEL = sys.argv[1:]


class Sky(BaseModel):
    """The state of the sky."""

    state: Literal["clear", "cloudy"]
    is_warm: bool


class AnyState(BaseModel):
    """The state of the sky, as it comes: what only a prompt asks for, a small model gets wrong."""

    state: object = None
    is_warm: object = None


def ask(mode: instructor.Mode, kind: type[BaseModel]) -> BaseModel:
    with openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key="none") as plain:
        return instructor.from_openai(plain, mode=mode).create(
            model=MODEL,
            messages=[{"role": "user", "content": "Is the sky clear?"}],
            response_model=kind,
            temperature=0,
            max_tokens=600,
            max_retries=0,
        )


def main() -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        assert isinstance(ask(mode, Sky), Sky), mode
    try:
        found = ask(instructor.Mode.JSON, AnyState)
        assert isinstance(found, AnyState)
    except IncompleteOutputException as cut:  # a small model may open more objects than it closes
        choice = cut.last_completion.choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.content.startswith("{")


main()
