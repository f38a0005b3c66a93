"""What each key may use: requests, tokens, and requests at once."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from crma.access.key import Limits
from server.service.caller import ANYONE, Caller
from server.service.errors import Forbidden, OverQuota
from server.service.quotas import Quotas


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(clock)


def caller(name: str = "one", **limits: int) -> Caller:
    return Caller(name, limits=Limits(**limits))


def refused(act: Callable[[], None]) -> tuple[str | None, int]:
    """The limit that was met, and Retry-After."""
    with pytest.raises(OverQuota) as caught:
        act()
    return caught.value.field, int(caught.value.headers["Retry-After"])


def test_requests_over_the_rate_are_refused_until_exactly_retry_after(
    quotas: Quotas, clock: Clock
) -> None:
    one = caller(requests_per_minute=20)
    for _ in range(20):
        quotas.enter(one)
    field, seconds = refused(lambda: quotas.enter(one))
    assert (field, seconds) == ("requests_per_minute", 3)
    clock.now += seconds - 0.01
    refused(lambda: quotas.enter(one))
    clock.now += 0.01
    quotas.enter(one)
    refused(lambda: quotas.enter(one))


def test_a_refused_request_costs_nothing(quotas: Quotas, clock: Clock) -> None:
    one = caller(requests_per_minute=1)
    quotas.enter(one)
    for _ in range(50):
        refused(lambda: quotas.enter(one))
    clock.now += 60
    quotas.enter(one)


def test_requests_at_once_are_refused_until_one_has_ended(quotas: Quotas) -> None:
    one = caller(max_concurrent=2)
    quotas.enter(one)
    quotas.enter(one)
    assert refused(lambda: quotas.enter(one)) == ("max_concurrent", 1)
    quotas.leave(one)
    quotas.enter(one)
    refused(lambda: quotas.enter(one))


def test_tokens_are_known_at_the_end_so_that_debt_delays_the_next_request(
    quotas: Quotas, clock: Clock
) -> None:
    one = caller(tokens_per_minute=600)
    quotas.enter(one)
    quotas.spend(one, 1200)
    field, seconds = refused(lambda: quotas.enter(one))
    assert (field, seconds) == ("tokens_per_minute", 61)
    clock.now += seconds
    quotas.enter(one)


def test_keys_do_not_use_the_limits_of_others(quotas: Quotas) -> None:
    for name in ("one", "two"):
        quotas.enter(caller(name, requests_per_minute=1))
    for _ in range(100):
        quotas.enter(ANYONE)
        quotas.spend(ANYONE, 10**6)


def test_changed_limits_count_at_once_and_what_runs_goes_on(quotas: Quotas) -> None:
    one = caller(max_concurrent=1)
    quotas.enter(one)
    wider = replace(one, limits=Limits(max_concurrent=2))
    quotas.enter(wider)
    refused(lambda: quotas.enter(wider))
    quotas.leave(one)
    quotas.leave(wider)
    quotas.enter(one)
    refused(lambda: quotas.enter(one))


async def test_background_work_waits_for_tokens(
    quotas: Quotas, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = caller(tokens_per_minute=60)
    quotas.spend(one, 90)
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await quotas.until_tokens(lambda: one)
    assert sum(slept) == 31.0
    await quotas.until_tokens(lambda: ANYONE)
    assert sum(slept) == 31.0


def test_work_that_began_under_other_limits_gives_back_no_tokens(quotas: Quotas) -> None:
    """Each of its requests ended with a full minute for the key."""
    before, after = caller(tokens_per_minute=1000), caller(tokens_per_minute=10)
    quotas.enter(before)
    quotas.enter(after)
    quotas.spend(after, 70)
    quotas.spend(before, 1)
    assert refused(lambda: quotas.enter(after)) == ("tokens_per_minute", 6 * (61 + 1))


async def test_who_waits_for_tokens_sees_that_the_key_was_revoked(
    quotas: Quotas, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = caller(tokens_per_minute=1)
    quotas.spend(one, 1000)

    def current() -> Caller:
        if clock.now > 1000:
            raise Forbidden("revoked")
        return one

    async def sleep(seconds: float) -> None:
        assert seconds <= 5
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(Forbidden):
        await quotas.until_tokens(current)
