"""Answers in OpenAI's form: whole, or in chunks."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from server.engine.request import RequestOutput, TokenLogprob
from server.http.answer import Answer, event, tokens
from server.http.openai_logprobs import CompletionLogprobs, chat_logprob
from server.http.openai_schemas import ChatRequest, CompletionRequest, OpenAIRequest
from server.service.generation import SequenceResult

Body = TypeVar("Body", bound=OpenAIRequest)


@dataclass
class OpenAIAnswer(Answer[Body]):
    """One body; or chunks: one a token, one with the finish_reason, and one with the usage if asked
    for.

    The choices of several prompts are numbered through: n for the first prompt, then n for the
    second, and so on.

    kind, chunk_kind: the `object` of the body, and of a chunk.
    """

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    _begun: set[int] = field(default_factory=set, init=False)  # choices that have had a chunk
    _num_streamed: int = field(default=0, init=False)  # tokens, of all choices

    @abstractmethod
    def choice(self, index: int, sequence: SequenceResult) -> dict[str, Any]:
        """A finished choice, without its index and finish_reason."""

    @abstractmethod
    def delta(
        self, index: int, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        """What one token adds to a choice, without index and finish_reason."""

    def deltas(
        self, index: int, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> list[dict[str, Any]]:
        """What the chunks of one token add to a choice."""
        return [self.delta(index, token_id, text, logprob)]

    def held_back(self, _: int) -> list[dict[str, Any]]:
        """What chunks that were held back add to a choice that has ended."""
        return []

    def finish_reason(self, _: int, reason: str | None) -> str | None:
        """Why a choice ended.

        Args:
            reason: the engine's.
        """
        return reason

    @abstractmethod
    def last_delta(self, index: int) -> dict[str, Any]:
        """What the chunk with the finish_reason adds to a choice."""

    def body(self) -> dict[str, Any]:
        """The whole answer: the choices of all generations, one after the other."""
        choices: list[dict[str, Any]] = []
        for generation in self.generations:
            for sequence in generation.sequences:
                index = len(choices)
                choice = {
                    "index": index,
                    **self.choice(index, sequence),
                    "finish_reason": self.finish_reason(index, sequence.last.finish_reason),
                }
                choices.append(choice)
        return {
            **self._head(self.kind),
            "choices": choices,
            "usage": self._usage(),
            "provenance": self.provenance(),
        }

    def events(self, number: int, output: RequestOutput) -> Iterator[str]:
        """A chunk for each new token, and one for the finish reason."""
        index = self.index(number, output)
        for token_id, text, logprob in tokens(output):
            self._num_streamed += token_id is not None
            for delta in self.deltas(index, token_id, text, logprob):
                yield self.chunk(index, delta)
        if output.finish_reason is not None:
            for delta in self.held_back(index):
                yield self.chunk(index, delta)
            last = self.last_delta(index)
            reason = self.finish_reason(index, output.finish_reason)
            yield self.chunk(index, last, reason, provenance=self.provenance())

    def done(self) -> Iterator[str]:
        """The usage, where it was asked for, and the end of the stream."""
        if self.asked.stream_options.include_usage:
            yield self._chunk([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def index(self, number: int, output: RequestOutput) -> int:
        """The choice to which an output of generation `number` belongs."""
        return number * self.asked.n + output.index

    def begins(self, index: int) -> bool:
        """Whether a choice has had no chunk before; from now on it has."""
        if index in self._begun:
            return False
        self._begun.add(index)
        return True

    def chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any
    ) -> str:
        """The event of a chunk that adds to one choice."""
        choice = {"index": index, **delta, "finish_reason": finish_reason}
        return self._chunk([choice], **more)

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
        options = self.asked.stream_options
        chunk = {**self._head(self.chunk_kind), "choices": choices}
        if options.continuous_usage_stats:
            chunk["usage"] = self._usage(self._num_streamed)
        elif options.include_usage:
            chunk["usage"] = None  # as OpenAI has it in every chunk but the last
        return event({**chunk, **more})

    def _usage(self, num_streamed: int | None = None) -> dict[str, Any]:
        """The token counts of all prompts; in the middle of a stream, of the tokens so far."""
        usages = [generation.usage() for generation in self.generations]
        prompt_tokens = sum(usage["prompt_tokens"] for usage in usages)
        completion_tokens = sum(usage["completion_tokens"] for usage in usages)
        if num_streamed is not None:
            completion_tokens = num_streamed
        cached_tokens = sum(usage["cached_tokens"] for usage in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


@dataclass
class CompletionAnswer(OpenAIAnswer[CompletionRequest]):
    """The answer of /v1/completions. With `echo` each choice begins with its prompt."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    _logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict, init=False)
    _held: dict[int, list[RequestOutput]] = field(default_factory=dict, init=False)
    _echoes: dict[int, dict[str, Any]] = field(default_factory=dict, init=False)  # by prompt

    def choice(self, index: int, sequence: SequenceResult) -> dict[str, Any]:
        """The text, and the log-probabilities of its tokens where asked for."""
        echo = self._echo(index)
        answer = self._part(index, sequence.text, sequence.token_ids, sequence.logprobs)
        return answer if echo is None else _joined(echo, answer)

    def delta(
        self, index: int, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        """The token's text and its log-probability."""
        if token_id is None or logprob is None:
            return {"text": text, "logprobs": None}
        return self._part(index, text, [token_id], [logprob])

    def last_delta(self, _: int) -> dict[str, Any]:
        """No more text."""
        return {"text": "", "logprobs": None}

    def events(self, number: int, output: RequestOutput) -> Iterator[str]:
        """As in `OpenAIAnswer`; a choice begins with a chunk of its prompt where `echo` asks for
        it. Outputs wait until the prompt's log-probabilities have come."""
        held = self._held.setdefault(number, [])
        held.append(output)
        if not self._has_prompt_logprobs(number):
            return
        for each in held:
            index = self.index(number, each)
            echo = self._echo(index) if self.begins(index) else None
            if echo is not None:
                yield self.chunk(index, echo)
            yield from super().events(number, each)
        held.clear()

    def is_heavy(self, number: int, output: RequestOutput) -> bool:
        """As in `Answer`; the first chunk of a choice has the prompt."""
        is_first = self.index(number, output) not in self._begun
        shows_prompt = self.asked.echo and self.asked.logprobs is not None
        return shows_prompt and (is_first or bool(output.prompt_logprobs))

    def _has_prompt_logprobs(self, number: int) -> bool:
        """Whether those of a prompt are there, or none are asked for."""
        sampling = self.generations[number].request.sampling
        if sampling.prompt_logprobs is None:
            return True
        num_expected = len(self.generations[number].request.prompt_ids) - 1
        return len(self.generations[number].prompt_logprobs) == num_expected

    def _echo(self, index: int) -> dict[str, Any] | None:
        """The prompt of a choice, as it was sent; None without `echo`."""
        if not self.asked.echo:
            return None
        number = index // self.asked.n
        generation = self.generations[number]
        prompt_ids = generation.request.prompt_ids
        sent = self.asked.prompt[number]
        found = self._echoes.get(number)
        if found is not None:
            if found["logprobs"] is not None:
                self._logprobs_of(index).pass_prompt(found["text"])
            return found
        text = sent if isinstance(sent, str) else self.text(prompt_ids)
        logprobs = None
        if self.asked.logprobs is not None:
            of_choice = self._logprobs_of(index)
            logprobs = of_choice.of_prompt(prompt_ids, generation.prompt_logprobs, text)
        found = self._echoes[number] = {"text": text, "logprobs": logprobs}
        return found

    def _part(
        self, index: int, text: str, token_ids: list[int], logprobs: list[TokenLogprob]
    ) -> dict[str, Any]:
        """The next tokens of a choice's answer."""
        if self.asked.logprobs is None:
            return {"text": text, "logprobs": None}
        return {
            "text": text,
            "logprobs": self._logprobs_of(index).of_answer(token_ids, logprobs),
        }

    def _logprobs_of(self, index: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            skips_special = self.asked.skip_special_tokens
            made = CompletionLogprobs(self.frontend.texts, skips_special=skips_special)
            self._logprobs[index] = made
        return self._logprobs[index]


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two parts of a choice of /v1/completions, one after the other."""
    logprobs = first["logprobs"]
    if logprobs is not None:
        logprobs = {name: logprobs[name] + second["logprobs"][name] for name in logprobs}
    return {"text": first["text"] + second["text"], "logprobs": logprobs}


@dataclass
class ChatAnswer(OpenAIAnswer[ChatRequest]):
    """The answer of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, _: int, sequence: SequenceResult) -> dict[str, Any]:
        """The assistant's message."""
        message = {"role": "assistant", "content": sequence.text, "refusal": None}
        pairs = zip(sequence.token_ids, sequence.logprobs, strict=False)
        return {"message": message, "logprobs": self._logprobs(pairs)}

    def delta(
        self, index: int, token_id: int | None, text: str, logprob: TokenLogprob | None
    ) -> dict[str, Any]:
        """The token's text and its log-probability; at first, the role too."""
        role = {"role": "assistant"} if self.begins(index) else {}
        logprobs = None
        if token_id is not None and logprob is not None:
            logprobs = self._logprobs([(token_id, logprob)])
        return {"delta": {**role, "content": text}, "logprobs": logprobs}

    def last_delta(self, index: int) -> dict[str, Any]:
        """No more text; of an answer without any token, the role."""
        empty = {"role": "assistant", "content": ""}
        return {"delta": empty if self.begins(index) else {}, "logprobs": None}

    def _logprobs(self, pairs: Iterable[tuple[int, TokenLogprob]]) -> dict[str, Any] | None:
        """Those of tokens, given with their ids; None unless they were asked for."""
        if not self.asked.logprobs:
            return None
        content = [chat_logprob(self.frontend.texts, *pair) for pair in pairs]
        return {"content": content, "refusal": None}
