"""An asynchronous generator that can be ended from outside while it waits."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TypeVar

Item = TypeVar("Item")


class Interrupted(Exception):
    """What ended a generator from outside. `reason`: as it was given; "deadline" for a time."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(reason)
        self.reason = reason


async def interruptible(
    items: AsyncGenerator[Item, None], ended: asyncio.Future[str | None], until: float | None
) -> AsyncGenerator[Item, None]:
    """The items, until the future has a result or a time has come; then `items` is closed.

    Args:
        until: seconds of time.monotonic(); None: no time ends it.

    Raises:
        Interrupted: it was ended.
    """
    following: asyncio.Future[Item | None] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(items, None))
            left_s = None if until is None else max(0.0, until - time.monotonic())
            await asyncio.wait(
                (following, ended), timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done():
                raise Interrupted(ended.result())
            if not following.done():
                raise Interrupted("deadline")
            item = following.result()
            if item is None:
                return
            yield item
    finally:
        if following is not None and not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await items.aclose()
