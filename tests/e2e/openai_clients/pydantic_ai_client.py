"""pydantic-ai: text, stream, and typed outputs by tool, by JSON schema and by prompt."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

ADDRESS, MODEL = sys.argv[1:]
QUESTION = "Is the sky clear?"


class Sky(BaseModel):
    """The state of the sky."""

    state: Literal["clear", "cloudy"]


async def main() -> None:
    provider = OpenAIProvider(base_url=f"{ADDRESS}/v1", api_key="none")
    model = OpenAIChatModel(MODEL, provider=provider)
    settings = {"temperature": 0, "max_tokens": 60}
    plain = Agent(model, instructions="Be brief.", model_settings=settings)
    first = await plain.run(QUESTION)
    async with plain.run_stream(QUESTION) as stream:
        assert await stream.get_output() == first.output
    await plain.run("And now?", message_history=first.all_messages())
    for kind in (ToolOutput, NativeOutput):
        typed = Agent(model, output_type=kind(Sky), model_settings=settings)
        assert isinstance((await typed.run(QUESTION)).output, Sky), kind


asyncio.run(main())
