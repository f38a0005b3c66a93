"""A client with one key, which knows what may come of each of its requests."""

import json
import time
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import httpx
from api_keys import Headers
from crma_client.sse import EventParser

from soak.gate import Gate
from soak.tally import Tally

CUT_OFF = "cut off"  # by a kill
PATIENCE_S = 1200.0


@dataclass(frozen=True)
class Stream:
    """A stream that ended.

    Attributes:
        events: name and data of each.
        ttft_s: from the request to its first event.
    """

    events: list[tuple[str, str]]
    ttft_s: float

    @property
    def failure(self) -> str | None:
        """The code of the error with which it ended; None: it ended as it should."""
        for name, data in self.events:
            if name == "error" or data.startswith('{"error"'):
                return str(json.loads(data)["error"]["code"])
        return None


@dataclass(eq=False)
class Caller:
    """Sends requests with one key.

    Args:
        name: of the key.
        headers: with the key.
        url: of the server.
        gate: knows whether the server was killed meanwhile.
        tally: counts what comes, and notes what may not.
    """

    name: str
    headers: Headers
    url: str
    gate: Gate
    tally: Tally

    def __post_init__(self) -> None:
        self.client = client_of(self.url, self.headers)

    def send(
        self, kind: str, method: str, path: str, may: Set[str], **request: Any
    ) -> httpx.Response | None:
        """Send a request.

        Args:
            kind: under which it is counted.
            may: what may come: statuses, with the code for errors, such as "404 not_found".
            request: as of httpx.

        Returns:
            The response; None if the server was killed meanwhile.
        """
        mark = self.gate.mark()
        try:
            response = self.client.request(method, path, **request)
        except httpx.TransportError as error:
            self._failed(kind, error, mark)
            return None
        self.note(kind, label(response), may, response.text)
        return response

    def stream(self, kind: str, path: str, may: Set[str], body: dict[str, Any]) -> Stream | None:
        """Send a request whose answer is streamed. Returns None for one that failed."""
        mark = self.gate.mark()
        started = time.monotonic()
        events: list[tuple[str, str]] = []
        first = None
        parser = EventParser()
        try:
            with self.client.stream("POST", path, json=body | {"stream": True}) as response:
                if response.status_code != 200:
                    response.read()
                    self.note(kind, label(response), may, response.text)
                    return None
                for chunk in response.iter_raw():
                    events += parser.feed(chunk)
                    first = first or time.monotonic()
        except httpx.TransportError as error:
            self._failed(kind, error, mark)
            return None
        found = Stream(events, (first or time.monotonic()) - started)
        came = "200" if found.failure is None else f"event {found.failure}"
        self.note(kind, came, may, str(events[-1:]))
        return found if found.failure is None else None

    def note(self, kind: str, came: str, may: Set[str], details: str) -> None:
        """Count what came; what may not have come is kept."""
        self.tally.count(kind, came)
        if came not in may:
            self.tally.unexpected.append(f"{kind} of {self.name}: {came}: {details[:300]}")

    def _failed(self, kind: str, error: httpx.TransportError, mark: int) -> None:
        if self.gate.was_out_since(mark):
            self.tally.count(kind, CUT_OFF)
            return
        self.note(kind, type(error).__name__, frozenset(), str(error))


def client_of(url: str, headers: Headers) -> httpx.Client:
    """A client that gives up idle connections before the server does.

    A request on a connection that is just being closed would fail.
    """
    limits = httpx.Limits(keepalive_expiry=1.0)
    return httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, limits=limits)


def label(response: httpx.Response) -> str:
    """The status of a response, with the code of its error."""
    if response.status_code < 400:
        return str(response.status_code)
    try:
        return f"{response.status_code} {response.json()['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} without a code"
