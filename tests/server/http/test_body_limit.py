"""server.http.body_limit: whose turn it is when many bodies are whole at the same time."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from server.http.body_limit import LARGE, BodyLimit

NUM_BODIES = 20


async def test_large_bodies_are_read_one_by_one() -> None:
    """Twenty of 1 MiB were read in one round of the event loop: /healthz waited for all."""
    loop = asyncio.get_running_loop()
    num_rounds = 0
    read_in: list[int] = []  # the round of each body

    def count_rounds() -> None:
        nonlocal num_rounds
        num_rounds += 1
        if len(read_in) < NUM_BODIES:
            loop.call_soon(count_rounds)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        read_in.append(num_rounds)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"x" * (LARGE + 1), "more_body": False}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    limit = BodyLimit(app, max_bytes=1 << 20, timeout_s=30)
    scope = {"type": "http", "method": "POST", "path": "/generate"}
    count_rounds()
    await asyncio.gather(*(limit(dict(scope), receive, send) for _ in range(NUM_BODIES)))
    assert len(set(read_in)) == NUM_BODIES
