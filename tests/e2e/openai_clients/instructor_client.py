"""instructor: a typed answer by tools, by JSON and by JSON schema."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel

ADDRESS, MODEL = sys.argv[1:]


class Sky(BaseModel):
    """The state of the sky."""

    state: Literal["clear", "cloudy"]
    is_warm: bool


class Anything(BaseModel):
    """Any JSON object: in JSON mode only the prompt names the fields, and a small model may err."""


def main() -> None:
    modes = {
        instructor.Mode.TOOLS: Sky,
        instructor.Mode.JSON_SCHEMA: Sky,
        instructor.Mode.JSON: Anything,
    }
    for mode, kind in modes.items():
        with openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key="none") as plain:
            found = instructor.from_openai(plain, mode=mode).create(
                model=MODEL,
                messages=[{"role": "user", "content": "Is the sky clear?"}],
                response_model=kind,
                temperature=0,
                max_tokens=600,
                max_retries=0,
            )
        assert isinstance(found, kind), mode


main()
