"""server.engine.native.step_budget: prompts get the tokens that fit into a step's time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.native.step_budget import FEWEST_TOKENS, StepBudget


def after(budget: StepBudget, decode_s: float, token_s: float, num_steps: int = 30) -> float:
    """Run steps that take so long, and return the time of the last one."""
    for _ in range(num_steps):
        budget.measure(decode_s, 0, 4)
    seconds = 0.0
    for _ in range(num_steps):
        num_tokens = budget.max_prompt_tokens()
        seconds = decode_s + num_tokens * token_s
        budget.measure(seconds, num_tokens, 4)
    return seconds


@settings(derandomize=True, deadline=None)
@given(st.floats(0.001, 0.15), st.floats(1e-5, 0.003))
def test_a_step_with_prompts_takes_the_target(decode_s: float, token_s: float) -> None:
    seconds = after(StepBudget(0.25), decode_s, token_s)
    fits = max(0.25, 2 * decode_s)
    assert seconds <= max(fits, decode_s + FEWEST_TOKENS * token_s) * 1.02
    assert seconds >= fits - token_s - 1e-6 or seconds == pytest.approx(fits, rel=0.05)


def test_where_decode_is_slow_prompts_get_as_much_time_as_it_takes() -> None:
    """Else most of a step would be decode."""
    assert after(StepBudget(0.25), decode_s=1.0, token_s=0.001) == pytest.approx(2.0, rel=0.05)


def test_prompts_go_on_however_long_their_tokens_take() -> None:
    budget = StepBudget(0.25)
    after(budget, decode_s=0.1, token_s=5.0)
    assert budget.max_prompt_tokens() == FEWEST_TOKENS


def test_one_step_that_was_held_up_does_not_last() -> None:
    budget = StepBudget(0.25)
    after(budget, decode_s=0.05, token_s=0.0005)
    usual = budget.max_prompt_tokens()
    budget.measure(60.0, usual, 4)
    assert budget.max_prompt_tokens() == FEWEST_TOKENS
    assert after(budget, 0.05, 0.0005) == pytest.approx(0.25, rel=0.05)
