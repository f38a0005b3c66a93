"""langchain-openai: invoke, stream, batch, structured output, tools, and the completion class."""

import sys
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

ADDRESS, MODEL = sys.argv[1:]
COMMON = {"base_url": f"{ADDRESS}/v1", "api_key": "none", "model": MODEL, "temperature": 0}


class Sky(BaseModel):
    """The state of the sky."""

    state: Literal["clear", "cloudy"]


@tool
def look(direction: Literal["up", "down"]) -> str:
    """Look in a direction."""
    return f"nothing is {direction}"


def main() -> None:
    chat = ChatOpenAI(max_tokens=60, **COMMON)
    short = ChatOpenAI(max_tokens=8, **COMMON)
    messages = [SystemMessage("Be brief."), HumanMessage("Is the sky clear?")]
    answer = short.invoke(messages)
    streamed = "".join(chunk.text for chunk in short.stream(messages))
    assert streamed == answer.text
    assert len(short.batch(["One", "Two", "Three"])) == 3
    short.invoke([*messages, answer, HumanMessage("And now?")])
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Sky, method=method).invoke(messages)
        assert isinstance(found, Sky), method
    caller = chat.bind_tools([look], tool_choice="any")
    called = caller.invoke(messages)
    (call,) = called.tool_calls
    assert call["args"]["direction"] in ("up", "down")
    result = ToolMessage(look.invoke(call["args"]), tool_call_id=call["id"])
    chat.bind_tools([look]).invoke([*messages, called, result])
    assert OpenAI(max_tokens=4, **COMMON).invoke("The sky is")


main()
