"""A token bucket: never more than the rate over time, and waits that are exactly long enough."""

from hypothesis import given
from hypothesis import strategies as st

from server.service.allowance import SECONDS, Allowance

STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=30)


def test_a_minutes_worth_may_be_spent_at_once_and_then_comes_back_evenly() -> None:
    allowance = Allowance(60, now=0.0)
    for _ in range(60):
        assert allowance.wait_s(1, 0.0) == 0
        allowance.spend(1, 0.0)
    assert allowance.wait_s(1, 0.0) == 1.0
    assert allowance.wait_s(1, 0.5) == 0.5
    assert allowance.wait_s(1, 1.0) == 0
    assert allowance.wait_s(60, 1000.0) == 0
    assert allowance.wait_s(61, 1000.0) > 0


def test_debt_is_paid_by_waiting() -> None:
    allowance = Allowance(60, now=0.0)
    allowance.spend(180, 0.0)
    assert allowance.wait_s(1, 0.0) == 121.0


@given(st.integers(1, 1000), STEPS)
def test_what_is_spent_is_never_over_the_rate_but_for_one_minutes_worth_and_the_last_debt(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    allowance = Allowance(per_minute, now=0.0)
    now = 0.0
    spent = 0
    for pause, amount in steps:
        now += pause
        if allowance.wait_s(1, now) > 0:
            continue
        assert spent <= per_minute * (1 + now / SECONDS) + 1e-6
        allowance.spend(amount, now)
        spent += amount


@given(st.integers(1, 1000), STEPS)
def test_after_the_wait_there_is_enough(per_minute: int, steps: list[tuple[float, int]]) -> None:
    allowance = Allowance(per_minute, now=0.0)
    now = 0.0
    for pause, amount in steps:
        now += pause
        allowance.spend(amount, now)
        now += allowance.wait_s(1, now)
        assert allowance.wait_s(1, now + 1e-6) < 1e-6
