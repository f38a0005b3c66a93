"""Which requests may wait, and which of them is next."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from server.engine import room
from server.engine.request import Request
from server.engine.vllm.stream import Stream

STEP_SECONDS = 0.1  # an estimate: vLLM does not say how long its steps take


@dataclass(frozen=True)
class Limits:
    """How much runs, waits and is kept at once.

    max_loras: selections in one step, the base model beside them.
    """

    max_num_seqs: int
    max_queue: int
    max_loras: int


def check_room(streams: Collection[Stream], request: Request, limits: Limits) -> None:
    """Check that a request may run or wait beside others, as `room.check_room`.

    Raises:
        QueueFull: it may not.
    """
    num_open: Counter[str] = Counter()
    for stream in streams:
        num_open[stream.request.owner] += stream.num_open
    room.check_room(
        num_open,
        request.owner,
        request.sampling.n,
        max_running=limits.max_num_seqs,
        max_queue=limits.max_queue,
        step_s=STEP_SECONDS,
    )


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
