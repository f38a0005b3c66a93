"""The openai SDK: blocking, asynchronous, streams, stream helper, parse, conversations, tools."""

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

ADDRESS, MODEL = sys.argv[1:]
QUESTION = {"role": "user", "content": "What is the weather in Rome?"}


class Weather(BaseModel):
    sky: Literal["clear", "cloudy"]
    is_warm: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def check_conversation(client: openai.OpenAI) -> None:
    """The SDK's own message objects are sent back as it makes them."""
    question = {"role": "user", "content": "What is the capital of France?"}
    messages = [{"role": "developer", "content": "Be brief."}, question]
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert first.choices[0].finish_reason == "stop"
    messages += [first.choices[0].message, {"role": "user", "content": "And of Germany?"}]
    second = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=4
    )
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def check_streams(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": [QUESTION], "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == whole
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert chunks[-1].usage.completion_tokens <= 12
    question = {"role": "user", "content": "What is the capital of France?"}
    with client.chat.completions.stream(model=MODEL, messages=[question], temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", text)


def check_structure(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=[QUESTION], response_format=Weather, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[QUESTION],
        extra_body={"structured_outputs": {"choice": ["sunny", "rainy"]}},
    )
    assert answer.choices[0].message.content in ("sunny", "rainy")


def check_tools(client: openai.OpenAI) -> None:
    """A call is made, answered, and the conversation goes on."""
    messages = [QUESTION]
    options = {"model": MODEL, "tools": [TOOL], "temperature": 0, "max_tokens": 60}
    answer = client.chat.completions.create(
        messages=messages, tool_choice="required", **options
    ).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")
    chunks = client.chat.completions.create(
        messages=messages, tool_choice="required", stream=True, **options
    )
    arguments = ""
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += part.function.arguments or ""
    assert json.loads(arguments) == json.loads(call.function.arguments)
    messages += [
        answer.message,
        {"role": "tool", "tool_call_id": call.id, "content": "clear, 25 degrees"},
    ]
    assert client.chat.completions.create(messages=messages, **options).choices


def check_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="A 😀 B", echo=True, logprobs=1, max_tokens=0
    )
    assert answer.choices[0].text == "A 😀 B"
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.text_offset) == answer.usage.prompt_tokens


def check_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input="What is the weather?", temperature=0, max_output_tokens=8, store=False
    )
    events = client.responses.create(
        model=MODEL,
        input="What is the weather?",
        temperature=0,
        max_output_tokens=8,
        store=False,
        stream=True,
    )
    text = "".join(each.delta for each in events if each.type == "response.output_text.delta")
    assert text == answer.output_text


def refusal(client: openai.OpenAI, **options: object) -> openai.APIStatusError:
    """The error that a request raises."""
    try:
        client.chat.completions.create(**options)
    except openai.APIStatusError as error:
        return error
    raise AssertionError(f"not refused: {options}")


def check_errors(client: openai.OpenAI) -> None:
    long = {"role": "user", "content": "word " * 20_000}
    too_long = refusal(client, model=MODEL, messages=[long])
    assert isinstance(too_long, openai.BadRequestError)
    assert too_long.code == "context_length_exceeded"
    assert "maximum context length is" in too_long.message
    unknown = refusal(client, model="nobody", messages=[QUESTION])
    assert isinstance(unknown, openai.NotFoundError)
    assert unknown.code == "model_not_found"


async def check_async() -> None:
    async with openai.AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=[QUESTION], max_tokens=4
        )
        assert answer.choices[0].message.role == "assistant"
        stream = await client.chat.completions.create(
            model=MODEL, messages=[QUESTION], max_tokens=4, stream=True
        )
        assert [chunk async for chunk in stream]


def main() -> None:
    with openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key="none", max_retries=0) as client:
        assert MODEL in [model.id for model in client.models.list()]
        check_conversation(client)
        check_streams(client)
        check_structure(client)
        check_tools(client)
        check_completions(client)
        check_responses(client)
        check_errors(client)
    asyncio.run(check_async())


main()
