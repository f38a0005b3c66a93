"""Server-sent events from bytes, however the network cuts them."""

import codecs
import io
from collections.abc import Iterator


class EventParser:
    """Feed bytes as they come; complete events come out, each as its name and its data.

    Follows the event-stream format of the HTML standard (section 9.2): lines end with LF, CR or CR LF, a blank line
    ends an event, lines that start with a colon are comments, the data lines of an event are joined by newlines, events
    without data are dropped, the name is "message" if the server gives none. `id` and `retry` mean nothing here, since
    a stream of tokens cannot be resumed. An unfinished event at the end of the stream is dropped. A CR that ends a
    chunk waits for the next one, which may begin with its LF.
    """

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._rest = self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        """The events that `chunk` completes, in order. Invalid UTF-8 becomes U+FFFD, as the standard asks."""
        *lines, self._rest = (self._rest + self._decoder.decode(chunk)).split("\n")
        for line in lines:
            field, _, value = line.partition(":")
            if field == "event":
                self._name = value.removeprefix(" ")
            elif field == "data":
                self._data.append(value.removeprefix(" "))
            elif not line:
                name, data, self._name, self._data = self._name, self._data, "", []
                if data:
                    yield name or "message", "\n".join(data)
