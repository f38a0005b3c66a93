"""server.engine.vllm.request_queue"""

import pytest
import tiny

from server.engine.errors import QueueFull
from server.engine.request import Request, SamplingParams
from server.engine.vllm.answer import Answer
from server.engine.vllm.request_queue import Limits, check_room, waiting
from server.engine.vllm.stream import Stream


def stream(
    name: str, owner: str = "", n: int = 1, *, has_begun: bool = False, interactive: bool = True
) -> Stream:
    request = Request(
        name, (5,), sampling=SamplingParams(n=n), owner=owner, interactive=interactive
    )
    answers = [Answer(request, index, tiny.tokenizer(), frozenset()) for index in range(n)]
    return Stream(request, answers, has_begun=has_begun)


async def test_interactive_requests_of_owners_who_run_least_are_next() -> None:
    streams = [
        stream("runs", "busy", n=2, has_begun=True),
        stream("background", "idle", interactive=False),
        stream("third", "busy"),
        stream("first", "idle"),
        stream("second", "idle"),
    ]
    names = [each.request.id for each in waiting(streams)]
    assert names == ["first", "second", "third", "background"]


async def test_an_owner_has_an_equal_part_of_a_full_queue() -> None:
    limits = Limits(max_num_seqs=2, max_queue=2, max_loras=1)
    streams = [stream(str(index), "greedy") for index in range(4)]
    with pytest.raises(QueueFull):
        check_room(streams, stream("5", "greedy").request, limits)
    check_room(streams, stream("5", "other", n=2).request, limits)
    with pytest.raises(QueueFull):
        check_room(streams, stream("5", "other", n=3).request, limits)
