"""How `AsyncClient` sends: again where that is safe, with its time-outs, and with typed errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from crma_client import calls
from crma_client.errors import CrmaClientError
from crma_client.retries import Retries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self


class AsyncConnection:
    """The connections to one server. `AsyncClient` documents the arguments."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float | None,
        retries: int,
        **http: Any,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=calls.server_url(base_url),
            headers=calls.headers(api_key),
            timeout=calls.time_limits(timeout),
            **http,
        )
        self._retries = Retries(retries)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        accepted: Sequence[int] = (),
        **form: Any,
    ) -> httpx.Response:
        """Send a request, perhaps again, and read the whole response. Raises as `calls.checked`."""

        async def send() -> httpx.Response:
            with calls.transport_errors():
                response = await self._http.request(method, path, content=content, **form)
            return calls.checked(response, *accepted)

        return await self._repeated(method, send)

    @asynccontextmanager
    async def _opened(
        self, method: str, path: str, content: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        """A response whose body has not been read, for the block. Raises as `calls.checked`."""

        async def send() -> httpx.Response:
            request = self._http.build_request(method, path, content=content)
            with calls.transport_errors():
                response = await self._http.send(request, stream=True)
                if response.status_code != 200:
                    await response.aread()  # which closes it
            return calls.checked(response)

        async with aclosing(await self._repeated(method, send)) as response:
            yield response

    async def _repeated(
        self, method: str, send: Callable[[], Awaitable[httpx.Response]]
    ) -> httpx.Response:
        """The first response of `send` that is no error, or its last error."""
        attempt = 0
        while True:
            try:
                return await send()
            except CrmaClientError as error:
                wait = self._retries.wait(attempt, method, error)
                if wait is None:
                    raise
            await asyncio.sleep(wait)
            attempt += 1
