"""Answers in OpenAI's form: whole, or in chunks."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

from server.engine.request import RequestOutput, TokenLogprob
from server.http.answer import Answer, event, tokens
from server.http.openai_schemas import ChatRequest, CompletionRequest, OpenAIRequest
from server.service.generation import Generation, SequenceResult

Body = TypeVar("Body", bound=OpenAIRequest)


class OpenAIAnswer(Answer[Body]):
    """One body; or chunks: one a token, one with the finish_reason, one with the usage if asked
    for.

    kind, chunk_kind: the `object` of the body, and of a chunk.
    """

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    @abstractmethod
    def choice(self, generation: Generation, sequence: SequenceResult) -> dict[str, Any]:
        """A finished choice, without its index and finish_reason."""

    @abstractmethod
    def delta(
        self, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        """The part of a choice that one token brings, without index and finish_reason."""

    @abstractmethod
    def last_delta(self) -> dict[str, Any]:
        """The part of a choice in the chunk that has its finish_reason."""

    def body(self) -> dict[str, Any]:
        """The whole answer: the choices of all generations, one after the other."""
        choices: list[dict[str, Any]] = []
        for generation in self.generations:
            for sequence in generation.sequences:
                choice = {
                    "index": len(choices),
                    **self.choice(generation, sequence),
                    "finish_reason": sequence.last.finish_reason,
                }
                choices.append(choice)
        return {
            **self._head(self.kind),
            "choices": choices,
            "usage": self._usage(),
            "provenance": self.provenance(),
        }

    def events(self, output: RequestOutput) -> Iterator[str]:
        """A chunk for each new token, and one for the finish reason."""
        for token_id, text, logprob in tokens(output):
            delta = self.delta(token_id, text, logprob)
            yield self._chunk([{"index": output.index, **delta, "finish_reason": None}])
        if output.finish_reason is not None:
            last = {
                "index": output.index,
                **self.last_delta(),
                "finish_reason": output.finish_reason,
            }
            yield self._chunk([last], provenance=self.provenance())

    def done(self) -> Iterator[str]:
        """The usage, where it was asked for, and the end of the stream."""
        if self.asked.stream_options.include_usage:
            yield self._chunk([], usage=self._usage())
        yield "data: [DONE]\n\n"

    @cached_property
    def _created(self) -> int:
        return int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.generation.request.id,
            "object": kind,
            "created": self._created,
            "model": self.asked.model,
        }

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {**self._head(self.chunk_kind), "choices": choices}
        if self.asked.stream_options.include_usage:
            chunk["usage"] = None  # as OpenAI has it in every chunk but the last
        return event({**chunk, **more})

    def _usage(self) -> dict[str, Any]:
        usages = [generation.usage() for generation in self.generations]
        prompt_tokens = sum(usage["prompt_tokens"] for usage in usages)
        completion_tokens = sum(usage["completion_tokens"] for usage in usages)
        cached_tokens = sum(usage["cached_tokens"] for usage in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


class CompletionAnswer(OpenAIAnswer[CompletionRequest]):
    """The answer of /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def choice(self, generation: Generation, sequence: SequenceResult) -> dict[str, Any]:
        """The text, after the prompt where `echo` asks for it."""
        token_ids = list(sequence.token_ids)
        logprobs: list[TokenLogprob | None] = list(sequence.logprobs)
        text = sequence.text
        if self.asked.echo:
            prompt_ids = generation.request.prompt_ids
            token_ids = [*prompt_ids, *token_ids]
            logprobs = [None, *generation.prompt_logprobs, *logprobs]
            text = self.text(prompt_ids) + text
        return {"text": text, "logprobs": self._logprobs(token_ids, logprobs)}

    def delta(
        self, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        """The token's text and its log-probability."""
        logprobs = None
        if token_id is not None and logprob is not None:
            logprobs = self._logprobs([token_id], [logprob])
        return {"text": text, "logprobs": logprobs}

    def last_delta(self) -> dict[str, Any]:
        """No more text."""
        return {"text": "", "logprobs": None}

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, Any] | None:
        """OpenAI's legacy form: four lists with one entry a token.

        The first token of a prompt has no log-probability.
        """
        if self.asked.logprobs is None:
            return None
        texts = [self.text([token_id]) for token_id in token_ids]
        offsets = accumulate((len(text) for text in texts), initial=0)
        return {
            "tokens": texts,
            "token_logprobs": [None if each is None else each.logprob for each in logprobs],
            "top_logprobs": [self._top(each) for each in logprobs],
            "text_offset": list(offsets)[: len(texts)],
        }

    def _top(self, logprob: TokenLogprob | None) -> dict[str, float] | None:
        """Token text to log-probability. Of tokens with one text, the most probable counts."""
        if logprob is None:
            return None
        top = {}
        for token in reversed(self.top_tokens(logprob)):
            top[token["token"]] = token["logprob"]
        return top


class ChatAnswer(OpenAIAnswer[ChatRequest]):
    """The answer of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, _: Generation, sequence: SequenceResult) -> dict[str, Any]:
        """The assistant's message."""
        message = {"role": "assistant", "content": sequence.text, "refusal": None}
        logprobs = None
        if self.asked.logprobs:
            pairs = zip(sequence.token_ids, sequence.logprobs, strict=False)
            logprobs = {"content": [self._logprob(*pair) for pair in pairs]}
        return {"message": message, "logprobs": logprobs}

    def delta(
        self, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        """The token's text and its log-probability."""
        logprobs = None
        if token_id is not None and logprob is not None:
            logprobs = {"content": [self._logprob(token_id, logprob)]}
        return {"delta": {"role": "assistant", "content": text}, "logprobs": logprobs}

    def last_delta(self) -> dict[str, Any]:
        """No more text."""
        return {"delta": {}, "logprobs": None}

    def _logprob(self, token_id: int, logprob: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(each["token"], each["logprob"]) for each in self.top_tokens(logprob)]
        return {**self._entry(self.text([token_id]), logprob.logprob), "top_logprobs": top}

    def _entry(self, text: str, logprob: float) -> dict[str, Any]:
        """A token. Part of a character has no text of its own, and so no bytes."""
        has_text = "�" not in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if has_text else None,
        }
