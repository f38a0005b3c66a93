"""POST /generate: one prompt, one task, CRMA on or off; whole or as server-sent events."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.engine.request import RequestOutput
from server.http.answer import Answer, event, tokens
from server.http.auth import TheCaller, counts, require_generate
from server.http.dependencies import AfterResponse, TheFrontend
from server.http.error_handlers import GENERATING, documented
from server.http.schemas import GenerateRequest
from server.service.errors import InvalidField
from server.service.generation import SequenceResult

router = APIRouter(dependencies=[require_generate, counts])


@router.post("/generate", responses=documented(*GENERATING, example_of="/generate"))
async def generate(
    body: GenerateRequest,
    request: Request,
    frontend: TheFrontend,
    caller: TheCaller,
    after_response: AfterResponse,
) -> Response:
    """Generate with a task adapter, the CRMA backbone, both or neither.

    The answer has `text` and `finish_reason`, for n > 1 in `choices`; `logprobs`, `top_logprobs`
    (id, token and logprob of each) and `prompt_logprobs` where asked for; `task` and `crma` as they
    were resolved. In `usage`, completion_tokens are those of all answers, and cached_tokens those
    of the prompt that the prefix cache had. `provenance` says exactly what answered: content
    digests, engine version, dtype and seed. A client that disconnects frees its work.
    """
    _check_fields(body)
    resolved = frontend.resolve(body.task, body.crma, caller=caller)
    if body.format_of is not None:
        prompt_format = frontend.registry.format_of(body.format_of, caller)
        resolved = dataclasses.replace(resolved, prompt_format=prompt_format)
    request.state.selection = resolved.selection
    sampling = body.sampling(
        logprobs=body.top_logprobs if body.logprobs else None,
        prompt_logprobs=0 if body.prompt_logprobs else None,
    )
    generation = await frontend.generation(
        body.prompt,
        resolved,
        sampling,
        raw=body.raw,
        add_special_tokens=body.add_special_tokens is not False,
        timeout_s=body.timeout_s,
    )
    answer = GenerateAnswer(body, [generation], frontend)
    return await answer.respond(request, after_response, stream=body.stream)


def _check_fields(body: GenerateRequest) -> None:
    """Raises InvalidField for fields that do not go together."""
    if body.top_logprobs and not body.logprobs:
        message = "top_logprobs: needs logprobs"
        raise InvalidField(message, field="top_logprobs", value=body.top_logprobs, allowed=0)
    if body.add_special_tokens is not None and not body.raw:
        message = "add_special_tokens: only a raw prompt has the choice"
        value = body.add_special_tokens
        raise InvalidField(message, field="add_special_tokens", value=value, allowed=None)
    if body.format_of is not None and body.raw:
        message = "format_of: a raw prompt has no prompt format"
        raise InvalidField(message, field="format_of", value=body.format_of, allowed=None)


class GenerateAnswer(Answer[GenerateRequest]):
    """One body; or `token` events, then `done`: the body without the text and logprobs."""

    error_event = "error"

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        generation = self.generation
        answer: dict[str, Any] = {"id": generation.request.id}
        if self.asked.n > 1:
            choices = enumerate(generation.sequences)
            answer["choices"] = [{"index": i, **self._choice(each)} for i, each in choices]
        else:
            answer.update(self._choice(generation.sequences[0]))
        if self.asked.prompt_logprobs:
            logprobs = [each.logprob for each in generation.prompt_logprobs]
            answer["prompt_logprobs"] = [None, *logprobs]  # the first token has none
        return {
            **answer,
            "task": self.asked.task,
            "crma": generation.request.selection.crma_digest is not None,
            "usage": generation.usage(),
            "timings": dataclasses.asdict(generation.timings()),
            "provenance": self.provenance(),
        }

    def events(self, _number: int, output: RequestOutput) -> Iterator[str]:
        """A `token` event for each new token."""
        for _, text, logprob in tokens(output):
            data: dict[str, Any] = {"index": output.index, "text": text}
            if logprob is not None:
                data["logprob"] = logprob.logprob
                if self.asked.top_logprobs:
                    data["top_logprobs"] = self.top_tokens(logprob)
            yield event(data, "token")

    def done(self) -> Iterator[str]:
        """The `done` event."""
        yield event(self.body(), "done")

    def _choice(self, sequence: SequenceResult) -> dict[str, Any]:
        """An answer; of a stream without the text and log-probabilities that its tokens brought."""
        finish_reason = sequence.last.finish_reason
        if self.asked.stream:
            return {"finish_reason": finish_reason}
        choice: dict[str, Any] = {"text": sequence.text, "finish_reason": finish_reason}
        if self.asked.logprobs:
            choice["logprobs"] = [each.logprob for each in sequence.logprobs]
            if self.asked.top_logprobs:
                choice["top_logprobs"] = [self.top_tokens(each) for each in sequence.logprobs]
        return choice
