"""POST /v1/completions, as OpenAI's clients send and read it. Refusals are OpenAI's in form (`server/errors.py`)."""

import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from crma.errors import NotFound
from server.answer import Answer, Closing, event, tokens
from server.auth import require_key
from server.engine.request import RequestOutput
from server.errors import GENERATING, InvalidField, ModelNotFound, documented
from server.frontend import Frontend, TheFrontend
from server.registry import Resolved
from server.schemas import CompletionRequest, OpenAIErrorBody

router = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])

RESPONSES = documented(*GENERATING, body=OpenAIErrorBody, of="/v1/completions")
SUFFIXES = {"crma-on": True, "crma-off": False}


@router.post("/completions", responses=RESPONSES)
async def completions(body: CompletionRequest, request: Request, frontend: TheFrontend, closing: Closing) -> Response:
    """OpenAI's legacy completion of a raw prompt; `model` chooses the task adapter and whether CRMA is on.

    The answer is OpenAI's `text_completion`, and `provenance`: what `model` was resolved to, and the seed.
    """
    if body.stream_options.include_usage and not body.stream:
        raise InvalidField("stream_options: needs stream", field="stream_options", value="include_usage", allowed=None)
    resolved = _resolve(body, frontend)
    request.state.selection = resolved.selection
    generation = await frontend.generation(body.prompt, resolved, body.sampling(), raw=True, prefix="cmpl")
    return await _Completion(body, generation, frontend).respond(request, closing, stream=body.stream)


def _resolve(body: CompletionRequest, frontend: Frontend) -> Resolved:
    """The adapters of `model` and `crma`, which may not contradict each other."""
    name, _, suffix = body.model.rpartition(":")
    crma = SUFFIXES.get(suffix, body.crma)
    if body.crma not in (None, crma):
        raise InvalidField("crma: model says otherwise", field="crma", value=body.crma, allowed=crma)
    name = name if suffix in SUFFIXES else body.model
    try:
        return frontend.resolve(None if name == "base" else name, crma)
    except NotFound as error:
        raise ModelNotFound(f"no model {name!r}", field="model", value=name, allowed=error.allowed) from error


class _Completion(Answer[CompletionRequest]):
    """One body, or its chunks: one a token, one a finish_reason, one for the usage if asked for."""

    def body(self) -> dict[str, Any]:
        sequences = enumerate(self.generation.sequences)
        choices = [_choice(index, sequence.text, sequence.last.finish_reason) for index, sequence in sequences]
        return {**self._head, "choices": choices, "usage": self._usage(), "provenance": self.provenance()}

    def events(self, output: RequestOutput) -> Iterable[str]:
        for text, _ in tokens(output):
            yield self._chunk([_choice(output.index, text, None)])
        if output.finish_reason is not None:
            yield self._chunk([_choice(output.index, "", output.finish_reason)], provenance=self.provenance())

    def done(self) -> Iterable[str]:
        if self.asked.stream_options.include_usage:
            yield self._chunk([], usage=self._usage())
        yield "data: [DONE]\n\n"

    @cached_property
    def _head(self) -> dict[str, Any]:
        named = {"id": self.generation.request.id, "object": "text_completion", "created": int(time.time())}
        return named | {"model": self.asked.model}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if self.asked.stream_options.include_usage else {}  # OpenAI has it in every chunk then
        return event({**self._head, "choices": choices, **usage, **more})

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        cached = usage.pop("cached_tokens")
        return {**usage, "total_tokens": sum(usage.values()), "prompt_tokens_details": {"cached_tokens": cached}}


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
