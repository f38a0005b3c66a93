"""Bodies of requests, within the limits, that were made to keep the server busy."""

import json
from typing import Any

CHAT: dict[str, Any] = {
    "model": "base",
    "max_tokens": 1,
    "messages": [{"role": "system", "content": "y"}, {"role": "user", "content": "x"}],
}


def nested(levels: int) -> str:
    return "[" * levels + "1" + "]" * levels


def many(count: int, item: str) -> str:
    return "[" + ",".join([item] * count) + "]"


def with_json(body: dict[str, Any], text: str) -> str:
    """The JSON of a body in which "X" is replaced by other JSON."""
    return json.dumps(body, ensure_ascii=False).replace('"X"', text)


def ablation(answers: Any = ("a",), count: int = 1, **more: Any) -> dict[str, Any]:
    question = {"task": "medical", "question": "q?", "answers": answers}
    return {
        "questions": [{"id": str(i), **question} for i in range(count)],
        "variants": ["base"],
        **more,
    }


def tools(parameters: Any, count: int = 1) -> dict[str, Any]:
    functions = [{"name": f"f{i}", "parameters": parameters} for i in range(count)]
    return {"tools": [{"type": "function", "function": each} for each in functions]}


WIDE = {f"p{i}": {"type": "string"} for i in range(30_000)}
DEEP = many(1200, nested(400))
BODIES: dict[str, tuple[str, str]] = {
    "an answer of 340,000 U+FDFA": (
        "/ablation",
        with_json(ablation(["\ufdfa" * 340_000], max_tokens=1), ""),
    ),
    "34 answers of 9,900 U+FDFA": (
        "/ablation",
        with_json(ablation(["\ufdfa" * 9900], 34, max_tokens=1), ""),
    ),
    "200,000 answers": ("/ablation", with_json(ablation("X"), many(200_000, '"a"'))),
    "200,000 answers of a wrong type": ("/ablation", with_json(ablation("X"), many(200_000, "1"))),
    "300,000 questions": ("/ablation", f'{{"questions": {many(300_000, "1")}}}'),
    "10,000 questions in eight variants": (
        "/ablation",
        with_json(ablation(count=10_000) | {"variants": ["base"] * 8, "repeat": True}, ""),
    ),
    "a deep provenance": ("/ablation", with_json(ablation(provenance={"a": "X"}), DEEP)),
    "a wide provenance": (
        "/ablation",
        with_json(ablation(provenance=dict.fromkeys(map(str, range(60_000)), 1)), ""),
    ),
    "a deep body": ("/generate", nested(500_000)),
    "a deep field": ("/generate", f'{{"prompt": {many(500, nested(950))}}}'),
    "deep chat_template_kwargs": (
        "/v1/chat/completions",
        with_json(CHAT | {"chat_template_kwargs": {"a": "X"}}, DEEP),
    ),
    "wide chat_template_kwargs": (
        "/v1/chat/completions",
        with_json(CHAT | {"chat_template_kwargs": {"a": "X"}}, many(300_000, "[]")),
    ),
    "deep tool parameters": (
        "/v1/chat/completions",
        with_json(CHAT | tools({"a": "X"}), many(1200, nested(400))),
    ),
    "wide tool parameters": ("/v1/chat/completions", with_json(CHAT | tools(WIDE), "")),
    "many tools": (
        "/v1/chat/completions",
        with_json(CHAT | tools(dict(list(WIDE.items())[:250]), 100), ""),
    ),
    "a deep schema": (
        "/generate",
        with_json({"prompt": "x", "structured_outputs": {"json": {"a": "X"}}}, DEEP),
    ),
    "a wide schema": (
        "/generate",
        with_json({"prompt": "x", "structured_outputs": {"json": {"properties": WIDE}}}, ""),
    ),
    "messages of a wrong type": (
        "/v1/chat/completions",
        with_json({"model": "base", "messages": "X"}, many(30_000, '{"role": 1, "content": 1}')),
    ),
    "14,000 tool calls": (
        "/v1/chat/completions",
        with_json(
            CHAT | {"messages": [{"role": "assistant", "content": "", "tool_calls": "X"}]},
            many(14_000, '{"id": "1", "function": {"name": "f", "arguments": "{}"}}'),
        ),
    ),
    "200,000 prompts": (
        "/v1/completions",
        f'{{"model": "base", "prompt": {many(200_000, "[1]")}}}',
    ),
    "200,000 token ids that are none": (
        "/v1/completions",
        f'{{"model": "base", "prompt": [{many(200_000, "1.5")}]}}',
    ),
    "330,000 token ids": (
        "/v1/completions",
        f'{{"model": "base", "prompt": {many(330_000, "1")}}}',
    ),
    "300,000 stops of a wrong type": (
        "/generate",
        f'{{"prompt": "x", "stop": {many(300_000, "1")}}}',
    ),
    "70,000 biases of a wrong type": (
        "/generate",
        json.dumps({"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(70_000)), "x")}),
    ),
    "70,000 metadata of a wrong type": (
        "/v1/responses",
        json.dumps(
            {"model": "base", "input": "x", "metadata": dict.fromkeys(map(str, range(70_000)), 1)}
        ),
    ),
    "80,000 items of input": (
        "/v1/responses",
        f'{{"model": "base", "input": {many(80_000, "{}")}}}',
    ),
    "200,000 token ids to decode that are none": (
        "/detokenize",
        f'{{"tokens": {many(200_000, "null")}}}',
    ),
    "a number of 900,000 digits": (
        "/generate",
        f'{{"prompt": "x", "max_tokens": {"9" * 900_000}}}',
    ),
    "170,000 halves of surrogate pairs": (
        "/generate",
        f'{{"prompt": "{chr(92)}ud800{"a" * 900_000}"}}',
    ),
}
