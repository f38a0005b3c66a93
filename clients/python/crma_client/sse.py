"""Server-sent events from bytes, however the network cuts them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One event: its type ("message" if the server named none) and its data lines joined by newlines."""

    name: str
    data: str


class EventParser:
    """Feed bytes as they come; complete events come out.

    Follows the event-stream format of the HTML standard (section 9.2): lines end with LF, CR or CR LF, a blank line
    ends an event, lines that start with a colon are comments, events without data are dropped. `id` and `retry` mean
    nothing here, since a stream of tokens cannot be resumed. An unfinished event at the end of the stream is dropped.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._after_cr = False
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes, in order. Invalid UTF-8 becomes U+FFFD, as the standard asks."""
        if self._after_cr and chunk:
            # The CR already ended its line: the LF of a CR LF that was cut in two is not a second, blank line.
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = self._after_cr or chunk.endswith(b"\r")
        *lines, self._buffer = (self._buffer + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        found = (self._line(line.decode("utf-8", errors="replace")) for line in lines)
        return [event for event in found if event is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._name or "message", "\n".join(self._data)) if self._data else None
        self._name, self._data = "", []
        return event
