"""autogen: a client's create and stream, and an agent that calls a tool."""

import asyncio
import sys
from typing import Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelInfo, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient

ADDRESS, MODEL = sys.argv[1:]
INFO = ModelInfo(
    vision=False,
    function_calling=True,
    json_output=True,
    family="unknown",
    structured_output=True,
)


async def look(direction: Literal["up", "down"]) -> str:
    """Look in a direction."""
    return f"nothing is {direction}"


def client(**options: object) -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model=MODEL,
        base_url=f"{ADDRESS}/v1",
        api_key="none",
        model_info=INFO,
        temperature=0,
        max_tokens=60,
        **options,
    )


async def main() -> None:
    plain = client()
    messages = [UserMessage(content="Is the sky clear?", source="user")]
    answer = await plain.create(messages)
    parts = [part async for part in plain.create_stream(messages)]
    assert "".join(part for part in parts if isinstance(part, str)) == answer.content
    await plain.close()
    calling = client(tool_choice="required")
    agent = AssistantAgent("watcher", calling, tools=[look], reflect_on_tool_use=False)
    result = await agent.run(task="Is the sky clear?")
    assert "nothing is" in result.messages[-1].to_text()
    await calling.close()


asyncio.run(main())
