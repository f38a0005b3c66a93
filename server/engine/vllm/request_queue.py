"""Which requests may wait, and which of them is next."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from server.engine.errors import QueueFull
from server.engine.request import Request
from server.engine.vllm.stream import Stream

RETRY_SECONDS = 1.0  # an estimate of when a full queue has room again


@dataclass(frozen=True)
class Limits:
    """How much runs, waits and is kept at once.

    max_loras: selections in one step, the base model beside them.
    """

    max_num_seqs: int
    max_queue: int
    max_loras: int


def check_room(streams: Collection[Stream], request: Request, limits: Limits) -> None:
    """Check that a request may run or wait beside others.

    An owner has an equal part of the room even where others have filled it.

    Raises:
        QueueFull: it may not.
    """
    num_open: Counter[str] = Counter()
    for stream in streams:
        num_open[stream.request.owner] += stream.num_open
    n, owner = request.sampling.n, request.owner
    room = limits.max_queue + limits.max_num_seqs
    part = room // len({*num_open, owner})
    if num_open.total() + n > room and num_open[owner] + n > part:
        raise QueueFull(limits.max_queue, RETRY_SECONDS)


def waiting(streams: Collection[Stream]) -> list[Stream]:
    """The requests that have not begun, in the order in which they may.

    Interactive ones go first, then those of owners who run least, then the oldest.
    """
    num_running: Counter[str] = Counter()
    for stream in streams:
        if stream.has_begun:
            num_running[stream.request.owner] += stream.num_open
    left = [stream for stream in streams if not stream.has_begun]
    left.sort(key=lambda s: (not s.request.interactive, num_running[s.request.owner]))
    return left
