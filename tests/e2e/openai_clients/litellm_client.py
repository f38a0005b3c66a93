"""litellm: completion, stream, async, text completion, JSON schema, tools."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads prices when imported

import litellm

ADDRESS, MODEL = sys.argv[1:]
COMMON = {"model": f"openai/{MODEL}", "api_base": f"{ADDRESS}/v1", "api_key": "none"}
MESSAGES = [{"role": "user", "content": "Is the sky clear?"}]
SCHEMA = {
    "type": "object",
    "properties": {"clear": {"type": "boolean"}},
    "required": ["clear"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def main() -> None:
    whole = litellm.completion(messages=MESSAGES, temperature=0, max_tokens=8, **COMMON)
    text = whole.choices[0].message.content
    chunks = litellm.completion(
        messages=MESSAGES, temperature=0, max_tokens=8, stream=True, **COMMON
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    again = asyncio.run(
        litellm.acompletion(messages=MESSAGES, temperature=0, max_tokens=8, **COMMON)
    )
    assert again.choices[0].message.content == text
    raw = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=f"{ADDRESS}/v1",
        api_key="none",
        prompt="The sky is",
        max_tokens=4,
    )
    assert raw.choices[0].text
    schema = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA}}
    answer = litellm.completion(
        messages=MESSAGES, response_format=schema, temperature=0, max_tokens=40, **COMMON
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["clear"], bool)
    called = litellm.completion(
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice="required",
        temperature=0,
        max_tokens=60,
        **COMMON,
    )
    (call,) = called.choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["clear"], bool)
    litellm.completion(
        messages=[*MESSAGES, called.choices[0].message, tool_result(call.id)],
        tools=[TOOL],
        max_tokens=4,
        **COMMON,
    )


def tool_result(call_id: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": call_id, "content": "yes"}


main()
