"""A scheduler without an engine: sequences that count up, and steps whose tokens are all 7."""

from crma.core.selection import AdapterSelection
from server.engine.native.block_pool import BlockPool, root_key
from server.engine.native.scheduler import Scheduler
from server.engine.native.sequence import Sequence
from server.engine.native.step import Step
from server.engine.native.step_planner import Admission
from server.engine.request import Request, SamplingParams

BLOCK_SIZE = 2


def make(num_blocks: int = 30, max_num_seqs: int = 3, budget: int = 8) -> Scheduler:
    blocks = BlockPool(num_blocks + 1, BLOCK_SIZE)
    return Scheduler(blocks, max_num_seqs, budget, lambda selection: root_key(*selection))


def sequence(
    length: int = 4,
    task: str | None = None,
    first: int = 0,
    n: int = 1,
    interactive: bool = True,
    cache_salt: str = "",
    owner: str = "",
    name: str = "r",
    arrival: float = 0.0,
    **sampling: int,
) -> Sequence:
    """A sequence whose prompt counts up from `first`."""
    request = Request(
        name,
        tuple(range(first, first + length)),
        sampling=SamplingParams(n=n, **sampling),
        selection=AdapterSelection(task),
        interactive=interactive,
        cache_salt=cache_salt,
        owner=owner,
        arrival=arrival,
    )
    return Sequence(request, 0)


def run(scheduler: Scheduler, step: Step) -> None:
    """Do as the engine does after a forward pass: each chunk that samples gets one more token."""
    scheduler.computed(step.chunks)
    for chunk in step.chunks:
        if chunk.sequence.num_pending_tokens == 0:
            chunk.sequence.token_ids.append(7)


def now(_: Sequence) -> Admission:
    return Admission.NOW
