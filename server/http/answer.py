"""From generations to a response: one JSON body, or server-sent events.

A route says what they hold.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.engine.request import RequestOutput, TokenLogprob
from server.http.error_handlers import answered, error_body
from server.http.json_text import json_text
from server.service.errors import ApiError, ClientGone
from server.service.frontend import Frontend
from server.service.generation import Generation, NumberedOutputs, all_finished, outputs_of

T = TypeVar("T")
Body = TypeVar("Body")
HEAVY = 2000
"""Log-probabilities that take about 10 ms to show; the event loop waits no longer than that."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps makes one for each event
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass
class Answer(ABC, Generic[Body]):
    """The answer to a request body: one generation, or one for each of several prompts.

    error_event: the name of the event by which a stream reports an error.
    """

    asked: Body
    generations: Sequence[Generation]
    frontend: Frontend
    error_event: ClassVar[str | None] = None

    @property
    def generation(self) -> Generation:
        """The first generation."""
        return self.generations[0]

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer, once every generation has ended."""

    @abstractmethod
    def events(self, number: int, output: RequestOutput) -> Iterator[str]:
        """The events of an output of generation `number`: one a token (see `tokens`)."""

    @abstractmethod
    def done(self) -> Iterator[str]:
        """The events after the last output."""

    def failed(self, error: ApiError, path: str) -> Iterator[str]:
        """The events that end a stream in which an error came up."""
        yield event(error_body(error, path), self.error_event)

    def is_heavy(self, _: int, output: RequestOutput) -> bool:
        """Whether the events of an output of a generation take long to build."""
        return len(output.prompt_logprobs) > HEAVY

    async def respond(
        self, request: Request, after_response: AsyncExitStack, *, stream: bool
    ) -> Response:
        """The response.

        A stream waits for its first output, so that a refused request is answered with its own
        status. However the response ends, `after_response` closes the generations. The access log
        finds them in `request.state`.
        """
        request.state.generations = self.generations
        if not stream:
            await unless_gone(request, all_finished(self.generations))
            return await self._whole()
        outputs = outputs_of(self.generations)
        after_response.push_async_callback(outputs.aclose)
        first = await unless_gone(request, anext(outputs))
        events = self._events(first, outputs, request)
        after_response.push_async_callback(events.aclose)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    @property
    def _num_logprobs(self) -> int:
        """How many log-probabilities the whole answer may show."""
        total = 0
        for generation in self.generations:
            sampling = generation.request.sampling
            num_prompt = len(generation.prompt_logprobs) * len(generation.sequences)
            total += num_prompt * (1 + (sampling.prompt_logprobs or 0))
            num_tokens = sum(len(sequence.logprobs) for sequence in generation.sequences)
            total += num_tokens * (1 + (sampling.logprobs or 0))
        return total

    async def _whole(self) -> Response:
        """The response of one body; a large one is built in another thread."""
        if self._num_logprobs <= HEAVY:
            return JSONResponse(self.body())
        text = await self.frontend.build(lambda: json_text(self.body()))
        return Response(text, media_type="application/json")

    async def _built(self, events: Iterable[str]) -> Iterable[str]:
        """Events, built in another thread."""
        return await self.frontend.build(lambda: list(events))

    async def _events(
        self, first: tuple[int, RequestOutput], rest: NumberedOutputs, request: Request
    ) -> AsyncGenerator[str, None]:
        numbered: tuple[int, RequestOutput] | None = first
        try:
            while numbered is not None:
                is_heavy = self.is_heavy(*numbered)
                texts: Iterable[str] = self.events(*numbered)
                for text in await self._built(texts) if is_heavy else texts:
                    yield text
                numbered = await anext(rest, None)
            is_heavy = self._num_logprobs > HEAVY
            texts = self.done()
            for text in await self._built(texts) if is_heavy else texts:
                yield text
        except Exception as error:  # the status is sent already: an error can only be an event
            for text in self.failed(answered(request, error), request.scope["path"]):
                yield text

    def provenance(self) -> dict[str, Any]:
        """Exactly what answered, and with which seed; `seeds` has those of several prompts."""
        request = self.generation.request
        selection = request.selection
        found = self.frontend.provenance(
            request.sampling.seed, selection.crma_digest, task=selection.task_digest
        )
        if len(self.generations) > 1:
            found["seeds"] = [each.request.sampling.seed for each in self.generations]
        return found

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""
        return self.frontend.encoder.text(token_ids)

    def top_tokens(self, logprob: TokenLogprob) -> list[dict[str, Any]]:
        """The most probable tokens, most probable first, each with its own text."""
        top = []
        for token_id, value in logprob.top:
            token = self.frontend.texts.text_of(token_id)
            top.append({"id": token_id, "token": token, "logprob": value})
        return top


def tokens(output: RequestOutput) -> Iterator[tuple[int | None, str, TokenLogprob | None]]:
    """(id, text, log-probability where asked for) of every new token.

    An output of several tokens has its text on the last of them. An output without tokens may have
    text that was held back: then its id is None.
    """
    texts = []
    if output.token_ids or output.text:
        texts = [""] * (len(output.token_ids) - 1) + [output.text]
    return zip_longest(output.token_ids, texts, output.logprobs)


def event(data: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event."""
    lines = f"data: {_ENCODER.encode(data)}\n\n"
    return f"event: {name}\n{lines}" if name else lines


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. If the client disconnects first, cancels it and raises ClientGone."""

    async def disconnected() -> None:
        message = await request.receive()
        while message["type"] != "http.disconnect":
            message = await request.receive()

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client went away")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
