"""Parses server-sent events from bytes, wherever the network splits them."""

import codecs
import io
from collections.abc import Iterator


class EventParser:
    """An incremental parser of the event-stream format (HTML standard, section 9.2).

    - A line ends with LF, CR or CR LF. A CR at the end of a chunk waits for the next chunk, which
      may begin with its LF.
    - A blank line ends an event. An event that the stream leaves unfinished is dropped.
    - The data lines of an event are joined by newlines. An event without data is dropped.
    - An event without a name is called "message".
    - A line that starts with a colon is a comment.
    - `id` and `retry` are ignored, since a stream of tokens cannot be resumed.
    """

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._unfinished_line: list[str] = []  # in pieces: joined once, when it ends
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        """Yield the name and data of each event that `chunk` completes, in order.

        Invalid UTF-8 becomes U+FFFD, as the standard asks.
        """
        first, *others = self._decoder.decode(chunk).split("\n")
        self._unfinished_line.append(first)
        for next_line in others:
            line = "".join(self._unfinished_line)
            self._unfinished_line = [next_line]
            field, _, value = line.partition(":")
            if field == "event":
                self._name = value.removeprefix(" ")
            elif field == "data":
                self._data.append(value.removeprefix(" "))
            elif not line:
                name = self._name or "message"
                data = self._data
                self._name = ""
                self._data = []
                if data:
                    yield name, "\n".join(data)
