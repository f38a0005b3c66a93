"""autogen: a client's create and stream, a required call, and an agent with a tool."""

import asyncio
import json
import sys
from typing import Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelInfo, UserMessage
from autogen_core.tools import FunctionTool
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


def client() -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model=MODEL,
        base_url=f"{ADDRESS}/v1",
        api_key="none",
        model_info=INFO,
        temperature=0,
        max_tokens=60,
    )


async def main() -> None:
    model = client()
    messages = [UserMessage(content="Is the sky clear?", source="user")]
    answer = await model.create(messages)
    parts = [part async for part in model.create_stream(messages)]
    assert "".join(part for part in parts if isinstance(part, str)) == answer.content
    tool = FunctionTool(look, description="Look in a direction.")
    called = await model.create(messages, tools=[tool], tool_choice="required")
    (call,) = called.content
    assert json.loads(call.arguments)["direction"] in ("up", "down")
    agent = AssistantAgent("watcher", model, tools=[tool])  # which lets the model choose
    result = await agent.run(task="Is the sky clear?")
    assert result.messages[-1].source == "watcher"
    await model.close()


asyncio.run(main())
