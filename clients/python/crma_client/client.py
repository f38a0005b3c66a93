"""`Client` and `AsyncClient`: the same calls, blocking and awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import (
    AsyncExitStack,
    ExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
)
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from crma_client import calls
from crma_client.calls import GenerateOptions, TokenReader
from crma_client.errors import ConnectionFailed, InvalidArgument, TimedOut
from crma_client.types import Generation, Token

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

H = TypeVar("H", httpx.Client, httpx.AsyncClient)
G = TypeVar("G")  # Generation
D = TypeVar("D")  # dict, JSON as it came
L = TypeVar("L")  # list, JSON as it came
B = TypeVar("B")  # bool
S = TypeVar("S")  # str

Read = Callable[[httpx.Response], Any]
Body = Mapping[str, Any] | bytes | None

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


class _Calls(Generic[H, G, D, L, B, S]):
    """What both clients do alike. The type arguments are their httpx client, and what they return: the answers, or
    awaitables of them. Every method raises from the tree in `crma_client.errors`, and nothing else.
    """

    _http_client: type[H]

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        **http: Any,
    ) -> None:
        """
        Args:
            base_url: where the server listens.
            api_key: sent as a bearer token.
            timeout: seconds to wait for a connection, and for each part of an answer (a stream's next token; all of it
                where nothing streams). None waits for ever.
            http: what else an httpx client takes: verify, proxy, transport, ….

        Raises:
            InvalidArgument: which never shows the key.
        """
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise InvalidArgument("api_key must be printable ASCII", field="api_key")
            headers["Authorization"] = f"Bearer {api_key}"
        with _transport_errors():
            url = httpx.URL(str(base_url))
        self._http: H = self._http_client(base_url=url, headers=headers, timeout=timeout, **http)

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> G:
        """Generate an answer to `prompt`; see GenerateOptions."""
        return self._send("/generate", calls.read_answer, {**options, "prompt": prompt})

    def ablation(self, **body: Any) -> D:
        """Compare variants on a question set and wait for the report; mind `timeout`, which it must fit in.

        `body` is that of POST /ablation, which the server judges: question_set (one it knows by name) or questions
        (each {"id", "task", "question", "answers"}, perhaps with "choices"; any of its answers is right), tasks,
        variants (base, task, crma, task+crma, or of versions: task@v2+crma@v1), scorer, tolerance and
        relative_tolerance (numeric's), max_tokens, temperature, seed, margin (the difference in accuracy within which
        two variants count as equivalent), repeat (run variants that resolve to the same adapters apart), timeout_s (the
        deadline of each item), background (answer at once with an id), provenance (refuse what has changed since).
        """
        return self._send("/ablation", calls.read_object, body)

    def ablation_job(self, id: str) -> D:
        """A job in the background: its status, progress, request, and once it is done its result."""
        return self._send(f"/ablation/{quote(id, safe='')}", calls.read_object)

    def cancel_ablation(self, id: str) -> D:
        """Cancel a job where it runs still; its record stays."""
        return self._send(f"/ablation/{quote(id, safe='')}", calls.read_object, method="DELETE")

    def question_sets(self) -> L:
        """Name, digest and number of items of every set the server knows by name."""
        return self._send("/question_sets", calls.read_list)

    def upload_question_set(self, name: str, lines: bytes) -> D:
        """Keep a set of JSON Lines on the server under a name; needs the admin key."""
        return self._send(
            f"/question_sets/{quote(name, safe='')}", calls.read_object, lines, method="PUT"
        )

    def adapters(self) -> D:
        """The base model, the CRMA backbone and the task adapters that the server serves."""
        return self._send("/adapters", calls.read_object)

    def health(self) -> B:
        """Whether the process lives."""
        return self._send("/healthz", calls.read_probe)

    def ready(self) -> B:
        """Whether it has verified its store and run a step: False while it starts or drains."""
        return self._send("/readyz", calls.read_probe)

    def metrics(self) -> S:
        """The metrics in Prometheus' text format."""
        return self._send("/metrics", calls.read_text)

    def _send(self, path: str, read: Read, body: Body = None, method: str | None = None) -> Any:
        """What `read` makes of the answer to `_request`."""
        raise NotImplementedError

    def _request(self, path: str, body: Body, method: str | None = None) -> httpx.Request:
        """POST with fields as its JSON, GET without, unless another method is named; bytes are sent as they are."""
        content = calls.write_body(body) if isinstance(body, Mapping) else body
        return self._http.build_request(
            method or ("GET" if body is None else "POST"), path, content=content
        )


class Client(_Calls[httpx.Client, Generation, dict[str, Any], list[Any], bool, str]):
    """A CRMA Server, blocking. Use it as a context manager, or call `close()`. Safe to share between threads."""

    _http_client = httpx.Client

    @contextmanager
    def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> Iterator[TokenStream]:
        """As `generate`, token by token. Leaving the block before the end cancels the request on the server."""
        request = self._request("/generate", {**options, "prompt": prompt, "stream": True})
        with ExitStack() as stack:
            with _transport_errors():
                response = stack.enter_context(closing(self._http.send(request, stream=True)))
                if response.status_code != 200:
                    response.read()
            yield TokenStream(calls.checked(response))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, path: str, read: Read, body: Body = None, method: str | None = None) -> Any:
        with _transport_errors():
            response = self._http.send(self._request(path, body, method))
        return read(response)


class AsyncClient(
    _Calls[
        httpx.AsyncClient,
        Awaitable[Generation],
        Awaitable[dict[str, Any]],
        Awaitable[list[Any]],
        Awaitable[bool],
        Awaitable[str],
    ]
):
    """As Client, awaited. Use it as an async context manager, or call `aclose()`."""

    _http_client = httpx.AsyncClient

    @asynccontextmanager
    async def stream(
        self, prompt: str, **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[AsyncTokenStream]:
        """As `generate`, token by token. Leaving the block before the end cancels the request on the server."""
        request = self._request("/generate", {**options, "prompt": prompt, "stream": True})
        async with AsyncExitStack() as stack:
            with _transport_errors():
                response = await stack.enter_async_context(
                    aclosing(await self._http.send(request, stream=True))
                )
                if response.status_code != 200:
                    await response.aread()
            yield AsyncTokenStream(calls.checked(response))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send(
        self, path: str, read: Read, body: Body = None, method: str | None = None
    ) -> Any:
        with _transport_errors():
            response = await self._http.send(self._request(path, body, method))
        return read(response)


@contextmanager
def _transport_errors() -> Iterator[None]:
    """httpx's errors, and only those, as this package's."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimedOut(f"the server did not answer in time ({type(error).__name__})") from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InvalidArgument(
            f"base_url is not that of a server: {error}", field="base_url"
        ) from error
    except (httpx.RequestError, httpx.StreamError) as error:
        raise ConnectionFailed(
            f"no complete answer from the server: {error or type(error).__name__}"
        ) from error
