"""How `Client` sends: again where that is safe, with its time-outs, and with typed errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from crma_client import calls
from crma_client.errors import CrmaClientError
from crma_client.retries import Retries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self


class Connection:
    """The connections to one server. `Client` documents the arguments."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float | None,
        retries: int,
        **http: Any,
    ) -> None:
        self._http = httpx.Client(
            base_url=calls.server_url(base_url),
            headers=calls.headers(api_key),
            timeout=calls.time_limits(timeout),
            **http,
        )
        self._retries = Retries(retries)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        accepted: Sequence[int] = (),
        **form: Any,
    ) -> httpx.Response:
        """Send a request, perhaps again, and read the whole response. Raises as `calls.checked`."""

        def send() -> httpx.Response:
            with calls.transport_errors():
                response = self._http.request(method, path, content=content, **form)
            return calls.checked(response, *accepted)

        return self._repeated(method, send)

    @contextmanager
    def _opened(
        self, method: str, path: str, content: bytes | None = None
    ) -> Iterator[httpx.Response]:
        """A response whose body has not been read, for the block. Raises as `calls.checked`."""

        def send() -> httpx.Response:
            request = self._http.build_request(method, path, content=content)
            with calls.transport_errors():
                response = self._http.send(request, stream=True)
                if response.status_code != 200:
                    response.read()  # which closes it
            return calls.checked(response)

        with closing(self._repeated(method, send)) as response:
            yield response

    def _repeated(self, method: str, send: Callable[[], httpx.Response]) -> httpx.Response:
        """The first response of `send` that is no error, or its last error."""
        attempt = 0
        while True:
            try:
                return send()
            except CrmaClientError as error:
                wait = self._retries.wait(attempt, method, error)
                if wait is None:
                    raise
            time.sleep(wait)
            attempt += 1
