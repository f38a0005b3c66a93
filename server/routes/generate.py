"""POST /generate: one prompt, one task, CRMA on or off; whole or as server-sent events."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.auth import require_key
from server.engine.request import RequestOutput, SamplingParams
from server.errors import ApiError, documented, error_body, to_api_error
from server.frontend import Frontend, Generation, TheFrontend, unless_gone
from server.schemas import GenerateRequest, GenerateResponse

log = logging.getLogger("server")

router = APIRouter(dependencies=[Depends(require_key)])

STREAM = 'event: token\ndata: {"index": 0, "text": "infectious"}\n\nevent: done\ndata: {"id": "gen-4b1c", …}\n\n'


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {"content": {"text/event-stream": {"example": STREAM}}},
        **documented(400, 401, 404, 409, 413, 422, 429, 500, 503, 504),
    },
)
async def generate(body: GenerateRequest, request: Request, frontend: TheFrontend) -> Response:
    """Generate with a task adapter, the CRMA backbone, both or neither. A client that goes away frees its work."""
    resolved = frontend.resolve(body.task, body.crma)
    request.state.selection = resolved.selection
    fields = body.model_dump(include={field.name for field in dataclasses.fields(SamplingParams)})
    sampling = SamplingParams(**fields | {"stop": tuple(body.stop)})
    generation = await frontend.generation(body.prompt, resolved, sampling, raw=body.raw, timeout_s=body.timeout_s)
    if body.stream:
        return await _stream(generation, body, request, frontend)
    try:
        await unless_gone(request, generation.finished())
        return JSONResponse(answer(generation, body, frontend))
    finally:
        generation.close()


def answer(generation: Generation, body: GenerateRequest, frontend: Frontend) -> dict[str, Any]:
    """The body of GenerateResponse; of a stream that of its `done` event, without texts and log-probabilities."""
    choices: list[dict[str, Any]] = []
    for index, sequence in enumerate(generation.sequences):
        choice: dict[str, Any] = {} if body.stream else {"text": sequence.text}
        choice["finish_reason"] = sequence.last and sequence.last.finish_reason
        if body.logprobs and not body.stream:
            choice["logprobs"] = sequence.logprobs
        choices.append({"index": index, **choice} if body.n > 1 else choice)
    selection, seed = generation.request.selection, generation.request.sampling.seed
    return {
        "id": generation.request.id,
        **({"choices": choices} if body.n > 1 else choices[0]),
        "task": body.task,
        "crma": selection.crma_digest is not None,
        "usage": generation.usage(),
        "timings": dataclasses.asdict(generation.timings()),
        "provenance": frontend.provenance(seed, selection.crma_digest, task=selection.task_digest),
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

    async def events() -> AsyncGenerator[str, None]:
        try:
            async with aclosing(outputs):
                for event in _token_events(first, logprobs=body.logprobs):
                    yield event
                async for output in outputs:
                    for event in _token_events(output, logprobs=body.logprobs):
                        yield event
            yield _event("done", answer(generation, body, frontend))
        except Exception as error:  # the status is sent: an error can only be an event
            if not isinstance(error, ApiError):
                log.exception("unexpected %s in a stream", type(error).__name__)
            yield _event("error", error_body(to_api_error(error)))

    return _EventStream(events(), generation)


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
