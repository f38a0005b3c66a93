"""From a generation to its response: one body, or server-sent events. A route says what these look like."""

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.engine.request import RequestOutput, TokenLogprob
from server.http.error_handlers import error_body
from server.service.errors import ApiError, ClientGone, to_api_error
from server.service.frontend import Frontend
from server.service.generation import Generation, Outputs, all_of

log = logging.getLogger("server")

Asked = TypeVar("Asked")
T = TypeVar("T")
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def _closing() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


# Is closed when the response has been sent, has failed, or never began.
Closing = Annotated[AsyncExitStack, Depends(_closing)]


@dataclass
class Answer(ABC, Generic[Asked]):
    """Generations on their way out: one, or of several prompts one each. An error in a stream is an `error_event`."""

    asked: Asked
    generations: Sequence[Generation]
    frontend: Frontend
    error_event: ClassVar[str | None] = None

    @property
    def generation(self) -> Generation:
        """The first; a stream has no other."""
        return self.generations[0]

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer, once all have ended."""

    @abstractmethod
    def events(self, output: RequestOutput) -> Iterable[str]:
        """The events of an output: one a token (see `tokens`)."""

    @abstractmethod
    def done(self) -> Iterable[str]:
        """The events after the last output."""

    async def respond(self, request: Request, closing: Closing, *, stream: bool) -> Response:
        """The response. A stream waits for its first output, so that a refused request is answered with its status and
        not within a stream. However this ends, and also if nobody reads it, `closing` gives its place back."""
        if not stream:
            await unless_gone(request, all_of(each.finished() for each in self.generations))
            return JSONResponse(self.body())
        outputs = self.generation.outputs()
        closing.push_async_callback(outputs.aclose)
        first = await unless_gone(request, anext(outputs))
        events = self._events(first, outputs, request.scope["path"])
        closing.push_async_callback(events.aclose)
        return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)

    async def _events(
        self, output: RequestOutput | None, rest: Outputs, path: str
    ) -> AsyncGenerator[str, None]:
        try:
            while output is not None:
                for each in self.events(output):
                    yield each
                output = await anext(rest, None)
            for each in self.done():
                yield each
        except Exception as error:  # the status is sent: an error can only be an event
            if not isinstance(error, ApiError):
                log.exception("unexpected %s in a stream", type(error).__name__)
            yield event(error_body(to_api_error(error), path), self.error_event)

    def provenance(self) -> dict[str, Any]:
        """Exactly what answered, with which seed."""
        selection, seed = self.generation.request.selection, self.generation.request.sampling.seed
        return self.frontend.provenance(seed, selection.crma_digest, task=selection.task_digest)


def tokens(output: RequestOutput) -> Iterable[tuple[int | None, str, TokenLogprob | None]]:
    """(id, text, log-probability where asked for) of every new token, also where its text is held back.

    An output of several tokens has its text on the last of them; one without tokens may have text that was held back.
    """
    texts = (
        [""] * (len(output.token_ids) - 1) + [output.text]
        if output.token_ids or output.text
        else []
    )
    return zip_longest(output.token_ids, texts, output.logprobs)


def event(data: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event."""
    return (
        f"event: {name}\n" if name else ""
    ) + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """`work`'s result; if the client goes away first, `work` is cancelled and ClientGone raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client went away")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
