"""server.ray.interruptible: generators that are ended while they wait."""

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from server.ray.interruptible import Interrupted, interruptible


class Numbers:
    """0, 1 and so on up to `num`, and then nothing for ever."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.is_closed = False

    async def items(self, *, hangs: bool) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.num):
                yield number
            if hangs:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


def never() -> asyncio.Future[str | None]:
    return asyncio.get_running_loop().create_future()


async def test_all_items_come_and_then_it_ends() -> None:
    numbers = Numbers(3)
    assert [i async for i in interruptible(numbers.items(hangs=False), never(), None)] == [0, 1, 2]
    assert numbers.is_closed


async def test_what_ends_it_is_raised_and_the_generator_is_closed() -> None:
    numbers, ended = Numbers(1), never()
    items = interruptible(numbers.items(hangs=True), ended, None)
    assert await anext(items) == 0
    asyncio.get_running_loop().call_soon(ended.set_result, "unloaded")
    with pytest.raises(Interrupted) as caught:
        await anext(items)
    assert caught.value.reason == "unloaded"
    assert numbers.is_closed


async def test_a_time_that_has_come_ends_it() -> None:
    numbers = Numbers(0)
    items = interruptible(numbers.items(hangs=True), never(), time.monotonic() - 1)
    with pytest.raises(Interrupted) as caught:
        await anext(items)
    assert caught.value.reason == "deadline"
    assert numbers.is_closed


async def test_closing_it_closes_the_generator() -> None:
    numbers = Numbers(5)
    items = interruptible(numbers.items(hangs=True), never(), None)
    await anext(items)
    await items.aclose()
    assert numbers.is_closed
