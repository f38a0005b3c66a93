"""Streamed answers: `TokenStream` for the blocking client, `AsyncTokenStream` for the async one."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import httpx

from crma_client.calls import transport_errors
from crma_client.errors import ProtocolError, stream_error
from crma_client.sse import EventParser
from crma_client.types import Choice, Generation, Token, read, read_generation, read_json

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Reader(Protocol[R_co]):
    """Turns the bytes of a streamed answer into tokens and, at its end, the whole answer."""

    def feed(self, chunk: bytes) -> Iterator[Token]:
        """Yield the tokens that `chunk` completes."""

    def result(self) -> R_co:
        """The whole answer. Raises ProtocolError if the stream has not ended."""


class TokenReader:
    """Reads a stream of POST /generate."""

    def __init__(self) -> None:
        self._events = EventParser()
        self._seen: list[Token] = []
        self._result: Generation | None = None

    def result(self) -> Generation:
        """The whole answer, texts included.

        Raises:
            ProtocolError: the stream has not been read to its end, or broke off before it.
        """
        if self._result is None:
            raise ProtocolError("there is no result: the stream has not sent its done event")
        return self._result

    def feed(self, chunk: bytes) -> Iterator[Token]:
        """Yield the tokens that `chunk` completes; the `done` event sets the result.

        Events that this version does not know are ignored.

        Raises:
            GenerationFailed: at an `error` event, after the tokens that precede it.
        """
        for name, data in self._events.feed(chunk):
            if name == "error":
                raise stream_error(read_json(data))
            if name == "done":
                answer = read_generation(read_json(data))
                choices = tuple(self._with_tokens(choice) for choice in answer.choices)
                self._result = replace(answer, choices=choices)
            if name == "token":
                token = read(Token, read_json(data))
                self._seen.append(token)
                yield token

    def _with_tokens(self, choice: Choice) -> Choice:
        """Add text and log-probabilities, which the `done` event omits, from the tokens."""
        tokens = [token for token in self._seen if token.index == choice.index]
        text = "".join(token.text for token in tokens)
        logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
        return replace(choice, text=text, logprobs=logprobs or None)


class TokenStream(Generic[R]):
    """The tokens of one answer as they arrive. Iterate once; then `result` is the whole answer."""

    def __init__(self, response: httpx.Response, reader: Reader[R]) -> None:
        self._response = response
        self._reader = reader
        self._tokens = self._read_tokens()

    @property
    def result(self) -> R:
        """The whole answer. Raises ProtocolError before the end of the stream."""
        return self._reader.result()

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def _read_tokens(self) -> Iterator[Token]:
        with transport_errors():
            for chunk in self._response.iter_bytes():
                yield from self._reader.feed(chunk)
        _ = self.result  # raises if the stream broke off


class AsyncTokenStream(Generic[R]):
    """The tokens of one answer, for `async for`; otherwise like TokenStream."""

    def __init__(self, response: httpx.Response, reader: Reader[R]) -> None:
        self._response = response
        self._reader = reader
        self._tokens = self._read_tokens()

    @property
    def result(self) -> R:
        """As `TokenStream.result`."""
        return self._reader.result()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens

    async def _read_tokens(self) -> AsyncIterator[Token]:
        with transport_errors():
            async for chunk in self._response.aiter_bytes():
                for token in self._reader.feed(chunk):
                    yield token
        _ = self.result  # raises if the stream broke off
