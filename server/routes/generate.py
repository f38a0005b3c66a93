"""POST /generate: one prompt, one task, CRMA on or off; whole or as server-sent events."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.auth import require_key
from server.engine.request import RequestOutput, SamplingParams
from server.errors import ApiError, error_body, to_api_error
from server.frontend import Frontend, Generation, TheFrontend, unless_gone
from server.routes.responses import errors
from server.schemas import GenerateRequest, GenerateResponse

log = logging.getLogger("server")

router = APIRouter(dependencies=[Depends(require_key)])

EXAMPLE = json.loads("""
{"id": "gen-4b1c", "text": "infectious diseases", "finish_reason": "stop", "task": "medical", "crma": true,
 "usage": {"prompt_tokens": 31, "completion_tokens": 3, "cached_tokens": 0},
 "timings": {"queue_s": 0.001, "ttft_s": 0.05, "e2e_s": 0.08},
 "provenance": {"base": "sha256:…", "task": "sha256:…", "crma": "sha256:…", "engine": "0.1.0", "dtype": "bfloat16",
                "seed": 7}}
""")
STREAM_EXAMPLE = (
    'event: token\ndata: {"index": 0, "text": "infectious"}\n\nevent: done\ndata: {"id": "gen-4b1c", …}\n\n'
)
CONTENT = {"application/json": {"example": EXAMPLE}, "text/event-stream": {"example": STREAM_EXAMPLE}}


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={200: {"content": CONTENT}, **errors(400, 401, 404, 409, 413, 422, 429, 500, 503, 504)},
)
async def generate(body: GenerateRequest, request: Request, frontend: TheFrontend) -> Response:
    """Generate with a task adapter, the CRMA backbone, both or neither. A client that goes away frees its work."""
    arrival = time.monotonic()
    resolved = frontend.resolve(body.task, body.crma)
    request.state.selection = resolved.selection
    sampling = SamplingParams(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        n=body.n,
        stop=tuple(body.stop),
        logprobs=body.logprobs,
        ignore_eos=body.ignore_eos,
    )
    prompt = await frontend.encode(body.prompt, resolved, raw=body.raw)
    generation = frontend.generation(prompt, resolved, sampling, timeout_s=body.timeout_s, arrival=arrival)
    if body.stream:
        return await _stream(generation, body, request, frontend)
    try:
        await unless_gone(request, generation.finished())
        return JSONResponse(answer(generation, body, frontend))
    finally:
        generation.close()


def answer(generation: Generation, body: GenerateRequest, frontend: Frontend, *, texts: bool = True) -> dict[str, Any]:
    """The body of GenerateResponse; without `texts` that of the `done` event."""
    choices: list[dict[str, Any]] = []
    for index, sequence in enumerate(generation.sequences):
        reason = sequence.last and str(sequence.last.finish_reason)
        choice: dict[str, Any] = {"index": index, "text": sequence.text, "finish_reason": reason}
        if body.logprobs:
            choice["logprobs"] = sequence.logprobs
        choices.append(choice if texts else {key: choice[key] for key in ("index", "finish_reason")})
    first = {key: value for key, value in choices[0].items() if key != "index"}
    return {
        "id": generation.request.id,
        **({"choices": choices} if body.n > 1 else first),
        "task": body.task,
        "crma": generation.resolved.crma,
        "usage": generation.usage().model_dump(),
        "timings": generation.timings().model_dump(),
        "provenance": frontend.provenance(generation).model_dump(),
    }


class _EventStream(StreamingResponse):
    """Server-sent events of one generation, which is closed however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], generation: Generation) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()
            await self._events.aclose()


async def _stream(generation: Generation, body: GenerateRequest, request: Request, frontend: Frontend) -> Response:
    """Waits for the first output, so that a refused request is answered with its status and not within a stream."""
    outputs = generation.outputs()
    try:
        first = await unless_gone(request, anext(outputs))
    except BaseException:
        generation.close()
        raise

    return _EventStream(_events(first, outputs, generation, body, frontend), generation)


async def _events(
    first: RequestOutput,
    outputs: AsyncGenerator[RequestOutput, None],
    generation: Generation,
    body: GenerateRequest,
    frontend: Frontend,
) -> AsyncGenerator[str, None]:
    try:
        async with aclosing(outputs):
            for event in _token_events(first, logprobs=body.logprobs):
                yield event
            async for output in outputs:
                for event in _token_events(output, logprobs=body.logprobs):
                    yield event
        yield _event("done", answer(generation, body, frontend, texts=False))
    except Exception as error:  # the status is sent: an error can only be an event
        if not isinstance(error, ApiError):
            log.exception("unexpected %s in a stream", type(error).__name__)
        yield _event("error", error_body(to_api_error(error)))


def _token_events(output: RequestOutput, *, logprobs: bool) -> list[str]:
    """One event a token. An output of several tokens has its text on the last of them."""
    count = max(len(output.token_ids), 1 if output.text else 0)
    tokens: list[dict[str, Any]] = [{"index": output.index, "text": ""} for _ in range(count)]
    if tokens:
        tokens[-1]["text"] = output.text
    if logprobs:
        for token, logprob in zip(tokens, output.logprobs, strict=False):
            token["logprob"] = logprob
    return [_event("token", token) for token in tokens]


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
