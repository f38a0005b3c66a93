"""Constraints and tools on the whole server, with a tiny real model: every answer keeps to them."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import pydantic
import pytest
import tiny
from openai import AsyncOpenAI
from transformers import PreTrainedTokenizerBase

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore

PROMPT = "Which chapter covers Cholera?"
# A template in the form of Hermes, short enough for the tiny model's context.
SHORT_TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.description }}{% endfor %}"
    "{% for m in messages %}{% for call in m.tool_calls or [] %}<tool_call>\n{{ "
    """'{"name": "' + call.function.name + '", "arguments": ' """
    "+ call.function.arguments | tojson }}"
    "}\n</tool_call>{% endfor %}{% endfor %}"
)


@dataclass
class App:
    """A client of a running app, and the app's tokenizer."""

    client: httpx.AsyncClient
    tokenizer: PreTrainedTokenizerBase

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer of a request that must succeed."""
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def answer(self, **body: Any) -> dict[str, Any]:
        """The answer of POST /generate."""
        return await self.post("/generate", **{"prompt": PROMPT, "max_tokens": 8, **body})


@pytest.fixture
async def served(base: BaseModel, store: AdapterStore) -> AsyncIterator[App]:
    async with tiny.serving(base, store.root) as app:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        yield App(client, app.state.frontend.tokenizer)


async def test_constrained_answers_keep_to_their_constraint_and_free_ones_beside_them_are_exact(
    served: App,
) -> None:
    labels = ["infectious diseases", "the other", "naïve 🙂"]
    label = {"structured_outputs": {"choice": labels}, "max_tokens": 60}
    schema = {"type": "object", "properties": {"a": {"enum": labels}}, "required": ["a"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    thing = {"structured_outputs": {"json": schema}, "max_tokens": 90}
    asked: list[dict[str, Any]] = [
        {"task": "medical", "crma": False},
        {"task": "medical", **label},
        {"crma": True},
        {"temperature": 1.5, "seed": 2, "n": 2, **label},
        thing,
    ]
    alone = [await served.answer(**body) for body in (asked[0], asked[2])]
    answers = await asyncio.gather(*(served.answer(**body) for body in asked))
    assert [answers[0]["text"], answers[2]["text"]] == [each["text"] for each in alone]
    assert answers[1]["text"] in labels
    assert {choice["text"] for choice in answers[3]["choices"]} <= set(labels)
    assert json.loads(answers[4]["text"])["a"] in labels
    assert {answers[1]["finish_reason"], answers[4]["finish_reason"]} == {"stop"}
    body = {"prompt": PROMPT, **asked[1], "stream": True}
    streamed = await served.client.post("/generate", json=body)
    parts = re.findall(r'^data: \{"index": 0, "text": (".*?")\}$', streamed.text, re.MULTILINE)
    assert "".join(json.loads(part) for part in parts) == answers[1]["text"]


class Label(pydantic.BaseModel):
    """An answer of a closed set of labels."""

    label: Literal["a", "the other"]


async def test_openais_client_parses_a_response_of_its_own_model(served: App) -> None:
    client = AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=served.client, max_retries=0
    )
    asked: Any = {"model": "base", "input": "Hi", "text_format": Label, "max_output_tokens": 90}
    answer = await client.responses.parse(**asked, temperature=1.2, extra_body={"seed": 5})
    assert isinstance(answer.output_parsed, Label)
    assert answer.text.format.type == "json_schema"
    async with client.responses.stream(**asked) as events:
        streamed = await events.get_final_response()
    assert isinstance(streamed.output_parsed, Label)


@pytest.mark.parametrize("stream", [False, True])
async def test_openais_client_gets_calls_that_fit_the_tools(served: App, stream: bool) -> None:
    parameters = {
        "type": "object",
        "properties": {"code": {"enum": ["a", "the other"]}, "sure": {"type": "boolean"}},
        "required": ["code", "sure"],
        "additionalProperties": False,
    }
    tools: Any = [
        {"type": "function", "function": {"name": "look_up", "parameters": parameters}},
        {"type": "function", "function": {"name": "stop"}},
    ]
    served.tokenizer.chat_template = SHORT_TOOLS + tiny.CHATML
    client = AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=served.client, max_retries=0
    )
    asked: Any = {
        "model": "base",
        "messages": [{"role": "user", "content": PROMPT}],
        "tools": tools,
        "tool_choice": {"type": "function", "function": {"name": "look_up"}},
        "max_tokens": 150,
        "temperature": 1.2,
        "seed": 5,
    }
    if stream:
        async with client.chat.completions.stream(**asked) as events:
            choice = (await events.get_final_completion()).choices[0]
    else:
        choice = (await client.chat.completions.create(**asked)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content in (None, "")
    [call] = choice.message.tool_calls or []
    assert call.function.name == "look_up"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"code", "sure"}
    assert arguments["code"] in ("a", "the other")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    asked["messages"] += [choice.message.model_dump(exclude_none=True), result]
    again = await client.chat.completions.create(**{**asked, "tool_choice": "none"})
    assert again.choices[0].finish_reason in ("stop", "length")


async def test_an_ablation_with_choices_has_no_other_answers(served: App) -> None:
    labels = ["one", "two", "the other"]
    items = [
        {"id": f"q{i}", "task": "medical", "question": f"Is it {i}?", "answers": ["two"]}
        for i in range(4)
    ]
    variants = ["task+crma", "task", "base"]
    report = await served.post("/ablation", questions=items, choices=labels, variants=variants)
    texts = {output["text"] for item in report["items"] for output in item["outputs"].values()}
    assert texts <= set(labels)
    assert report["provenance"]["choices"] == labels
