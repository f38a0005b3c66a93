"""OpenAI's routes, as its clients send and read them. Refusals are OpenAI's in form (`server/errors.py`)."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from crma.core.errors import NotFound
from crma.store.entry import TaskEntry
from server.engine.request import RequestOutput, TokenLogprob
from server.http.answer import Answer, Closing, event, tokens
from server.http.auth import require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import GENERATING, documented
from server.http.schemas import ChatRequest, CompletionRequest, OpenAIErrorBody, OpenAIRequest
from server.service.errors import InvalidField, ModelNotFound
from server.service.frontend import Frontend
from server.service.generation import Generation, SequenceResult
from server.service.registry import Resolved

router = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])

REFUSALS = documented(401, 404, 503, body=OpenAIErrorBody)
SUFFIXES = {"crma-on": True, "crma-off": False}
Asked = TypeVar("Asked", bound=OpenAIRequest)


@router.get("/models", responses=REFUSALS)
async def models(frontend: TheFrontend) -> dict[str, Any]:
    """What `model` may name: the base model and every task that serves; `:crma-on` or `:crma-off` may follow."""
    tasks = [_model(each.name, each, frontend) for each in frontend.registry.serving_tasks()]
    return {"object": "list", "data": [_model("base", None, frontend), *tasks]}


@router.get("/models/{model}", responses=REFUSALS)
async def model(model: str, frontend: TheFrontend) -> dict[str, Any]:
    """One of them, or a version of it."""
    return _model(model, _resolve(model, None, frontend).task, frontend)


@router.post(
    "/completions", responses=documented(*GENERATING, body=OpenAIErrorBody, of="/v1/completions")
)
async def completions(
    body: CompletionRequest, request: Request, frontend: TheFrontend, closing: Closing
) -> Response:
    """OpenAI's legacy completion of raw prompts; `model` chooses the task adapter and whether CRMA is on.

    The answer is OpenAI's `text_completion`, and `provenance`: what `model` was resolved to, and the seed. With `echo`
    and `logprobs` it has the log-probabilities of the prompt's tokens, as lm-eval asks for them.
    """
    if body.stream and (len(body.prompt) > 1 or body.echo):
        message = "stream: takes one prompt, without echo"
        raise InvalidField(message, field="stream", value=True, allowed=False)
    if len(body.prompt) > (limit := frontend.settings.max_queue):
        message = "prompt: more of them than may wait"
        raise InvalidField(
            message, field="prompt", value=len(body.prompt), allowed=f"<= {limit} prompts"
        )
    resolved = _resolved(body, request, frontend)
    of_prompt = body.logprobs if body.echo else None
    # lm-eval asks for one token after the prompt and cuts it off: it has to be there even if it ends the answer.
    on = body.ignore_eos or (body.echo and body.max_tokens == 1)
    sampling = body.sampling(logprobs=body.logprobs, prompt_logprobs=of_prompt, ignore_eos=on)
    work = [
        await frontend.generation(each, resolved, sampling, raw=True, prefix="cmpl")
        for each in body.prompt
    ]
    return await _Completion(body, work, frontend).respond(request, closing, stream=body.stream)


@router.post(
    "/chat/completions",
    responses=documented(*GENERATING, body=OpenAIErrorBody, of="/v1/chat/completions"),
)
async def chat(
    body: ChatRequest, request: Request, frontend: TheFrontend, closing: Closing
) -> Response:
    """OpenAI's chat completion; `model` chooses the task adapter and whether CRMA is on.

    One user turn to a task goes through the format that its adapter was trained with, as in /generate; anything else
    through the model's chat template. What is written in a message is text, never markup.
    """
    if body.top_logprobs and not body.logprobs:
        raise InvalidField(
            "top_logprobs: needs logprobs", field="top_logprobs", value=body.top_logprobs, allowed=0
        )
    resolved, turns = _resolved(body, request, frontend), body.turns()
    trained = (
        resolved.task is not None and resolved.task.prompt_format is not None and len(turns) == 1
    )
    sampling = body.sampling(logprobs=body.top_logprobs if body.logprobs else None)
    prompt = turns[0].content if trained and turns[0].role == "user" else turns
    work = [await frontend.generation(prompt, resolved, sampling, prefix="chatcmpl")]
    return await _Chat(body, work, frontend).respond(request, closing, stream=body.stream)


def _resolved(body: OpenAIRequest, request: Request, frontend: Frontend) -> Resolved:
    """The adapters of a body, for the log as well."""
    if body.stream_options.include_usage and not body.stream:
        raise InvalidField(
            "stream_options: needs stream",
            field="stream_options",
            value="include_usage",
            allowed=None,
        )
    resolved = _resolve(body.model, body.crma, frontend)
    request.state.selection = resolved.selection
    return resolved


def _resolve(model: str, asked: bool | None, frontend: Frontend) -> Resolved:
    """The adapters of `model` and `crma`, which may not contradict each other."""
    name, _, suffix = model.rpartition(":")
    crma = SUFFIXES.get(suffix, asked)
    if asked not in (None, crma):
        raise InvalidField("crma: model says otherwise", field="crma", value=asked, allowed=crma)
    name = name if suffix in SUFFIXES else model
    try:
        return frontend.resolve(None if name == "base" else name, crma)
    except NotFound as error:
        raise ModelNotFound(
            f"no model {name!r}", field="model", value=name, allowed=error.allowed
        ) from error


def _model(name: str, entry: TaskEntry | None, frontend: Frontend) -> dict[str, Any]:
    created = int(datetime.fromisoformat(entry.manifest.created).timestamp()) if entry else 0
    return {"id": name, "object": "model", "created": created, "owned_by": frontend.model.name}


class _OpenAIAnswer(Answer[Asked]):
    """One body, or its chunks: one a token, one a finish_reason, one for the usage if asked for."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    @abstractmethod
    def choice(self, generation: Generation, sequence: SequenceResult) -> dict[str, Any]:
        """A finished choice, but for its index and finish_reason."""

    @abstractmethod
    def delta(
        self, token: int | None, text: str | None, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        """The same of one token; `text` None: there is no more."""

    def body(self) -> dict[str, Any]:
        answers = [
            (generation, sequence)
            for generation in self.generations
            for sequence in generation.sequences
        ]
        choices = [
            {"index": index, **self.choice(*each), "finish_reason": each[1].last.finish_reason}
            for index, each in enumerate(answers)
        ]
        return {
            **self._head(self.kind),
            "choices": choices,
            "usage": self._usage(),
            "provenance": self.provenance(),
        }

    def events(self, output: RequestOutput) -> Iterable[str]:
        for each in tokens(output):
            yield self._chunk([{"index": output.index, **self.delta(*each), "finish_reason": None}])
        if output.finish_reason is not None:
            end = {
                "index": output.index,
                **self.delta(None, None, None),
                "finish_reason": output.finish_reason,
            }
            yield self._chunk([end], provenance=self.provenance())

    def done(self) -> Iterable[str]:
        if self.asked.stream_options.include_usage:
            yield self._chunk([], usage=self._usage())
        yield "data: [DONE]\n\n"

    @cached_property
    def _created(self) -> int:
        return int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        named = {"id": self.generation.request.id, "object": kind, "created": self._created}
        return named | {"model": self.asked.model}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        usage = (
            {"usage": None} if self.asked.stream_options.include_usage else {}
        )  # OpenAI has it in every chunk then
        return event({**self._head(self.chunk_kind), "choices": choices, **usage, **more})

    def _usage(self) -> dict[str, Any]:
        parts = [generation.usage() for generation in self.generations]
        usage = {name: sum(part[name] for part in parts) for name in parts[0]}
        cached = usage.pop("cached_tokens")
        return {
            **usage,
            "total_tokens": sum(usage.values()),
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class _Completion(_OpenAIAnswer[CompletionRequest]):
    kind = chunk_kind = "text_completion"

    def choice(self, generation: Generation, sequence: SequenceResult) -> dict[str, Any]:
        prompt = generation.request.prompt_ids if self.asked.echo else ()
        of_prompt = [None, *generation.prompt_logprobs] if prompt else []
        logprobs = self._logprobs((*prompt, *sequence.token_ids), [*of_prompt, *sequence.logprobs])
        return {"text": self.frontend.text(prompt) + sequence.text, "logprobs": logprobs}

    def delta(
        self, token: int | None, text: str | None, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        logprobs = (
            self._logprobs([token], [logprob])
            if token is not None and logprob is not None
            else None
        )
        return {"text": text or "", "logprobs": logprobs}

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, Any] | None:
        """OpenAI's legacy form: four lists, one entry a token; of the first of a prompt there is none."""
        if self.asked.logprobs is None:
            return None
        texts = [self.frontend.text([each]) for each in ids]
        tops = [each and self.frontend.top_tokens(each)[::-1] for each in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [each and each.logprob for each in logprobs],
            "top_logprobs": [
                each and {top["token"]: top["logprob"] for top in each} for each in tops
            ],
            "text_offset": [0, *accumulate(map(len, texts))][: len(texts)],
        }


class _Chat(_OpenAIAnswer[ChatRequest]):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def choice(self, _: Generation, sequence: SequenceResult) -> dict[str, Any]:
        logprobs = [
            self._logprob(*each)
            for each in zip(sequence.token_ids, sequence.logprobs, strict=False)
        ]
        message = {"role": "assistant", "content": sequence.text, "refusal": None}
        return {
            "message": message,
            "logprobs": {"content": logprobs} if self.asked.logprobs else None,
        }

    def delta(
        self, token: int | None, text: str | None, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        logprobs = (
            {"content": [self._logprob(token, logprob)]}
            if token is not None and logprob is not None
            else None
        )
        return {
            "delta": {} if text is None else {"role": "assistant", "content": text},
            "logprobs": logprobs,
        }

    def _logprob(self, token: int, logprob: TokenLogprob) -> dict[str, Any]:
        top = [
            self._named(each["token"], each["logprob"])
            for each in self.frontend.top_tokens(logprob)
        ]
        return {**self._named(self.frontend.text([token]), logprob.logprob), "top_logprobs": top}

    def _named(self, text: str, logprob: float) -> dict[str, Any]:
        """Part of a character has no text of its own, and so no bytes."""
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if "�" in text else list(text.encode()),
        }
