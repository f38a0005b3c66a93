"""A small ASGI app that speaks the wire contract, so that the client is tested over real HTTP messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "secret-key"
DIGEST = "sha256:" + "0" * 64
SCORE = {"correct": 71, "scored": 99, "failed": 1, "timed_out": 0, "accuracy": 0.7172, "wilson": [0.62, 0.8]}
COMPARISON = {
    "a": "task+crma",
    "b": "task",
    "difference": 0.68,
    "bootstrap": [0.58, 0.77],
    "mcnemar": {"gained": 69, "lost": 1, "p": 1.2e-19},
    "equivalent_within_margin": False,
}
TASK = {
    "name": "medical",
    "version": "v1",
    "digest": DIGEST,
    "rank": 8,
    "scaling": 2.0,
    "target_modules": ["q_proj", "v_proj"],
    "lineage": DIGEST,
    "measured": {"accuracy": 0.7},
    "resident": True,
    "added_later": 1,
}


def generation(body: dict[str, Any]) -> dict[str, Any]:
    """The answer of /generate: the prompt's words, upper-cased, as the text of every choice."""
    choice = {"text": body["prompt"].upper(), "finish_reason": "stop"}
    n = body.get("n", 1)
    choices = choice if n == 1 else {"choices": [{"index": i, **choice, "logprobs": [-0.5 * i]} for i in range(n)]}
    return {
        "id": "gen-1",
        **choices,
        "task": body.get("task"),
        "crma": bool(body.get("crma")),
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 0},
        "timings": {"queue_s": 0.001, "ttft_s": 0.05, "e2e_s": 0.08},
        "provenance": {"base": DIGEST, "task": None, "crma": None, "engine": "0.1.0", "dtype": "float32", "seed": 7},
        "added_later": {"sent": body},
    }


def events(body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The stream of the same answer: a token event per word and choice, then done without texts."""
    answer = generation(body)
    choices = answer.get("choices", [{"index": 0, "text": answer.get("text")}])
    words = [(c["index"], w) for c in choices for w in c["text"].split(" ")]
    tokens = [("token", {"index": index, "text": word, "logprob": -1.0}) for index, word in words]
    if body["prompt"] == "break":
        return tokens
    if body["prompt"] == "fail":
        return [*tokens, ("error", error("deadline", "the deadline passed", field="timeout", value=1, allowed=None))]
    for part in (answer, *answer.get("choices", [])):
        part.pop("text", None)
    return [*tokens, ("later", {"unknown": True}), ("done", answer)]


def error(code: str, message: str, **details: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "field": None, "value": None, "allowed": None, **details}}


async def generate(request: Request) -> Response:
    body = await request.json()
    task = body.get("task") or ""
    if task.isdigit():  # the test asks for this status
        details = error("as_asked", "no", field="task", value=task, allowed=["medical"])
        return JSONResponse(details, status_code=int(task), headers={"Retry-After": "2"})
    if task == "proxy":
        return PlainTextResponse("<html>bad gateway</html>", status_code=502)
    if task == "nonsense":
        return PlainTextResponse("not json")
    if not body.get("stream"):
        return JSONResponse(generation(body))
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events(body))
    return StreamingResponse((c for c in text), media_type="text/event-stream")


async def ablation(request: Request) -> Response:
    output = {"task+crma": {"text": "x", "correct": True}, "task": {"status": "failed", "error": "boom"}}
    report = {
        "id": "abl-1",
        "question_set": {"name": "public", "digest": DIGEST, "items": 100},
        "scorer": "exact",
        "variants": {"task+crma": {**SCORE, "by_task": {}}, "task": {**SCORE, "wilson": None, "by_task": {}}},
        "comparisons": [COMPARISON],
        "items": [{"id": "q1", "task": "medical", "answers": ["x"], "outputs": output}],
        "provenance": {"base": DIGEST},
        "wall_s": 4.2,
        "sent": await request.json(),
    }
    return JSONResponse(report)


async def operations(request: Request) -> Response:
    match request.url.path:
        case "/adapters" if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse(error("unauthorized", "an API key is needed"), status_code=401)
        case "/adapters":
            backbone = {"version": "v1", "digest": DIGEST, "certificate": {"bound": 0.1}}
            return JSONResponse({"base": {"digest": DIGEST}, "backbone": backbone, "tasks": [TASK]})
        case "/readyz":
            return JSONResponse(error("not_ready", "starting"), status_code=503)
        case _:
            return PlainTextResponse("crma_num_requests_running 0\n")


@pytest.fixture
def app() -> Starlette:
    return Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/ablation", ablation, methods=["POST"]),
            *(Route(path, operations) for path in ("/adapters", "/healthz", "/readyz", "/metrics")),
        ]
    )
