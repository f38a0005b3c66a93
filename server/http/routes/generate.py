"""POST /generate: one prompt, one task, CRMA on or off; whole or as server-sent events."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.engine.request import RequestOutput
from server.http.answer import Answer, Closing, event, tokens
from server.http.auth import require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import GENERATING, documented
from server.http.schemas import GenerateRequest
from server.service.errors import InvalidField
from server.service.generation import SequenceResult

router = APIRouter(dependencies=[Depends(require_key)])


@router.post("/generate", responses=documented(*GENERATING, of="/generate"))
async def generate(
    body: GenerateRequest, request: Request, frontend: TheFrontend, closing: Closing
) -> Response:
    """Generate with a task adapter, the CRMA backbone, both or neither. A client that goes away frees its work.

    The answer has `text` and `finish_reason`, for n > 1 in `choices`; `logprobs`, `top_logprobs` (of each token: id,
    token, logprob) and `prompt_logprobs` where asked for; `task` and `crma` as they were resolved. In `usage`,
    completion_tokens are those of all answers and cached_tokens those of the prompt whose KV was already there.
    `provenance` is exactly what answered: content digests, engine version, dtype and seed.
    """
    if body.top_logprobs and not body.logprobs:
        raise InvalidField(
            "top_logprobs: needs logprobs", field="top_logprobs", value=body.top_logprobs, allowed=0
        )
    resolved = frontend.resolve(body.task, body.crma)
    request.state.selection = resolved.selection
    top = body.top_logprobs if body.logprobs else None
    sampling = body.sampling(logprobs=top, prompt_logprobs=0 if body.prompt_logprobs else None)
    generation = await frontend.generation(
        body.prompt, resolved, sampling, raw=body.raw, timeout_s=body.timeout_s
    )
    return await _Generated(body, [generation], frontend).respond(
        request, closing, stream=body.stream
    )


class _Generated(Answer[GenerateRequest]):
    """One body, or `token` events and then `done`: the same without what the tokens brought."""

    error_event = "error"

    def body(self) -> dict[str, Any]:
        asked, generation = self.asked, self.generation
        choices = [
            {"index": index, **self._choice(sequence)}
            for index, sequence in enumerate(generation.sequences)
        ]
        prompt = [None, *(each.logprob for each in generation.prompt_logprobs)]
        return {
            "id": generation.request.id,
            **({"choices": choices} if asked.n > 1 else self._choice(generation.sequences[0])),
            **({"prompt_logprobs": prompt} if asked.prompt_logprobs else {}),
            "task": asked.task,
            "crma": generation.request.selection.crma_digest is not None,
            "usage": generation.usage(),
            "timings": dataclasses.asdict(generation.timings()),
            "provenance": self.provenance(),
        }

    def _choice(self, sequence: SequenceResult) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "text": sequence.text,
            "finish_reason": sequence.last.finish_reason,
        }
        if self.asked.stream:
            del choice["text"]
        elif self.asked.logprobs:
            choice["logprobs"] = [each.logprob for each in sequence.logprobs]
            if self.asked.top_logprobs:
                choice["top_logprobs"] = [
                    self.frontend.top_tokens(each) for each in sequence.logprobs
                ]
        return choice

    def events(self, output: RequestOutput) -> Iterable[str]:
        for _, text, logprob in tokens(output):
            data: dict[str, Any] = {"index": output.index, "text": text}
            if logprob is not None:
                data["logprob"] = logprob.logprob
                if self.asked.top_logprobs:
                    data["top_logprobs"] = self.frontend.top_tokens(logprob)
            yield event(data, "token")

    def done(self) -> Iterable[str]:
        yield event(self.body(), "done")
