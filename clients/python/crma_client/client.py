"""`Client` and `AsyncClient`: the same calls, blocking and awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from crma_client import calls
from crma_client.calls import AblationOptions, Call, GenerateOptions, TokenReader
from crma_client.errors import ConnectionFailed, InvalidArgument, TimedOut
from crma_client.types import AblationReport, AdapterListing, Generation, Token

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"


class TokenStream(TokenReader):
    """The tokens of one answer as they come: iterate once, then `result` is the whole Generation."""

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    @cached_property
    def _tokens(self) -> Iterator[Token]:
        with _transport_errors():
            for chunk in self._response.iter_bytes():
                yield from self._feed(chunk)
        _ = self.result  # raises if the stream broke off


class AsyncTokenStream(TokenReader):
    """As TokenStream, for `async for`."""

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens

    @cached_property
    async def _tokens(self) -> AsyncIterator[Token]:
        with _transport_errors():
            async for chunk in self._response.aiter_bytes():
                for token in self._feed(chunk):
                    yield token
        _ = self.result  # raises if the stream broke off


class Client:
    """A CRMA Server, blocking. Use it as a context manager, or call `close()`. Safe to share between threads.

    Args:
        base_url: where the server listens.
        api_key: sent as a bearer token.
        timeout: seconds to wait for a connection, and for each part of an answer (a stream's next token; all of it
            where nothing streams). None waits for ever.
        http: what else an httpx client takes: verify, proxy, transport, ….

    Every method raises from the tree in `crma_client.errors`, and nothing else.
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float | None = 60.0, **http: Any
    ) -> None:
        self._http = httpx.Client(**_options(base_url, api_key, timeout), **http)

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer to `prompt`; see GenerateOptions."""
        return self._send(calls.generate(prompt, options))

    @contextmanager
    def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> Iterator[TokenStream]:
        """As `generate`, token by token. Leaving the block before the end cancels the request on the server."""
        call = calls.stream(prompt, options)
        with ExitStack() as stack:
            with _transport_errors():
                response = stack.enter_context(self._http.stream(call.method, call.path, content=call.body))
                if response.status_code not in call.accepts:
                    response.read()
            yield TokenStream(call.answer(response))

    def ablation(self, **options: Unpack[AblationOptions]) -> AblationReport:
        """Compare variants on a question set and wait for the report; mind `timeout`, which it must fit in."""
        return self._send(calls.ablation(options))

    def adapters(self) -> AdapterListing:
        """The base model, the CRMA backbone and the task adapters that the server serves."""
        return self._send(calls.ADAPTERS)

    def health(self) -> bool:
        """Whether the process lives."""
        return self._send(calls.HEALTH)

    def ready(self) -> bool:
        """Whether it has verified its store and run a step: False while it starts or drains."""
        return self._send(calls.READY)

    def metrics(self) -> str:
        """The metrics in Prometheus' text format."""
        return self._send(calls.METRICS)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        with _transport_errors():
            response = self._http.request(call.method, call.path, content=call.body)
        return call.answer(response)


class AsyncClient:
    """As Client, awaited. Use it as an async context manager, or call `aclose()`."""

    def __init__(
        self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float | None = 60.0, **http: Any
    ) -> None:
        self._http = httpx.AsyncClient(**_options(base_url, api_key, timeout), **http)

    async def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer to `prompt`; see GenerateOptions."""
        return await self._send(calls.generate(prompt, options))

    @asynccontextmanager
    async def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> AsyncIterator[AsyncTokenStream]:
        """As `generate`, token by token. Leaving the block before the end cancels the request on the server."""
        call = calls.stream(prompt, options)
        async with AsyncExitStack() as stack:
            with _transport_errors():
                response = await stack.enter_async_context(self._http.stream(call.method, call.path, content=call.body))
                if response.status_code not in call.accepts:
                    await response.aread()
            yield AsyncTokenStream(call.answer(response))

    async def ablation(self, **options: Unpack[AblationOptions]) -> AblationReport:
        """Compare variants on a question set and wait for the report; mind `timeout`, which it must fit in."""
        return await self._send(calls.ablation(options))

    async def adapters(self) -> AdapterListing:
        """The base model, the CRMA backbone and the task adapters that the server serves."""
        return await self._send(calls.ADAPTERS)

    async def health(self) -> bool:
        """Whether the process lives."""
        return await self._send(calls.HEALTH)

    async def ready(self) -> bool:
        """Whether it has verified its store and run a step: False while it starts or drains."""
        return await self._send(calls.READY)

    async def metrics(self) -> str:
        """The metrics in Prometheus' text format."""
        return await self._send(calls.METRICS)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send(self, call: Call[T]) -> T:
        with _transport_errors():
            response = await self._http.request(call.method, call.path, content=call.body)
        return call.answer(response)


@contextmanager
def _transport_errors() -> Iterator[None]:
    """httpx's errors, and only those, as this package's."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimedOut(f"the server did not answer in time ({type(error).__name__})") from error
    except httpx.UnsupportedProtocol as error:
        raise InvalidArgument(f"base_url is not that of a server: {error}", field="base_url") from error
    except (httpx.RequestError, httpx.StreamError) as error:
        raise ConnectionFailed(f"no complete answer from the server: {error or type(error).__name__}") from error


def _options(base_url: str, api_key: str | None, timeout: float | None) -> dict[str, Any]:
    """What both httpx clients are made with. Raises InvalidArgument, which never shows the key."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise InvalidArgument("api_key must be printable ASCII", field="api_key")
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        return {"base_url": httpx.URL(base_url), "headers": headers, "timeout": timeout}
    except (httpx.InvalidURL, TypeError) as error:
        raise InvalidArgument(f"base_url is not a URL: {error}", field="base_url", value=base_url) from error
