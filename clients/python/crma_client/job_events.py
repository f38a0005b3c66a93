"""The progress of a background job, as its server-sent events report it."""

from collections.abc import Callable, Iterator
from typing import Any

from crma_client.sse import EventParser
from crma_client.types import read, read_json

OnProgress = Callable[[int, int], Any]
"""Called with the number of item-variants that are done, and of all."""

POLL_S = 1.0
"""How long a client waits before it asks again for a job whose events ended before it did."""


class ProgressReader:
    """Turns the bytes of GET /ablation/{id}/events into (done, total)."""

    def __init__(self) -> None:
        self._events = EventParser()

    def feed(self, chunk: bytes) -> Iterator[tuple[int, int]]:
        """Yield what `chunk` completes. Raises ProtocolError for another format."""
        for name, data in self._events.feed(chunk):
            if name == "progress":
                progress = read(dict, read_json(data))
                yield read(int, progress.get("done")), read(int, progress.get("total"))
