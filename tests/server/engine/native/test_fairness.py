"""How owners, adapters, and long and short prompts share the engine.

It tests shares, fair_queue, waiting and turns through the scheduler.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import make, now, run, sequence

from server.engine.native.fair_queue import SECONDS_A_TOKEN
from server.engine.native.scheduler import Scheduler
from server.engine.native.sequence import Sequence
from server.engine.native.shares import Shares
from server.engine.native.step import Step
from server.engine.native.step_planner import Admission


def steps_until(scheduler: Scheduler, awaited: Sequence, max_tokens: int = 20) -> int:
    """Run until a sequence has its first token; those with enough tokens end on the way."""
    for number in range(1, 2000):
        step(scheduler, max_tokens)
        if awaited.num_output_tokens:
            return number
    raise AssertionError("it starves")


def step(scheduler: Scheduler, max_tokens: int = 20) -> Step:
    planned = scheduler.schedule(now)
    run(scheduler, planned)
    for running in list(scheduler.running):
        if running.num_output_tokens >= max_tokens:
            scheduler.remove(running)
    scheduler.check_integrity()
    return planned


def test_one_request_of_an_owner_does_not_wait_behind_hundreds_of_another() -> None:
    """It waited until all 300 had been answered: 60 s."""
    scheduler = make(num_blocks=400, max_num_seqs=16, budget=64)
    for i in range(300):
        scheduler.add(sequence(8, first=20 * i, owner="many"))
    for _ in range(10):
        step(scheduler)
    single = sequence(8, owner="one")
    scheduler.add(single)
    assert steps_until(scheduler, single) == 1
    assert len(scheduler.running) == 16


def test_owners_that_always_have_work_get_equal_shares_whatever_they_send() -> None:
    """One sends many short requests, another a few long ones; a third comes later."""
    scheduler = make(num_blocks=200, max_num_seqs=6, budget=32)
    tokens: Counter[str] = Counter()

    def refill(owner: str, length: int) -> None:
        own = [s for s in scheduler.unfinished() if s.request.owner == owner]
        for _ in range(12 - len(own)):
            scheduler.add(sequence(length, first=sum(tokens.values()), owner=owner))

    for number in range(600):
        refill("short", 6)
        refill("long", 40)
        if number >= 200:
            refill("late", 20)
        if number in (200, 300):
            tokens.clear()  # from here on all three are there, and have settled
        for chunk in step(scheduler, max_tokens=10).chunks:
            tokens[chunk.sequence.request.owner] += chunk.count
    shares = [tokens[owner] / sum(tokens.values()) for owner in ("short", "long", "late")]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)


def test_adapters_of_an_owner_take_turns() -> None:
    scheduler = make(num_blocks=100, max_num_seqs=2, budget=8)
    for i in range(40):
        scheduler.add(sequence(4, "popular", first=10 * i))
    for _ in range(6):
        step(scheduler, max_tokens=4)
    rare = sequence(4, "rare", first=900)
    scheduler.add(rare)
    assert steps_until(scheduler, rare, max_tokens=4) <= 5, "as soon as one of the two has ended"


def test_a_short_prompt_does_not_wait_behind_long_ones_of_the_same_owner() -> None:
    """It had no service in 125 s behind eight prompts of 2,000 tokens."""
    scheduler = make(num_blocks=1000, max_num_seqs=16, budget=32)
    for i in range(8):
        scheduler.add(sequence(400, first=500 * i))
    for _ in range(3):
        step(scheduler)
    short = sequence(6, first=9000, arrival=0.1)
    scheduler.add(short)
    assert steps_until(scheduler, short) == 1


def test_a_long_prompt_is_overtaken_for_a_limited_time_only() -> None:
    """Short prompts never stop coming, a hundred a second, and take all that a step has."""
    scheduler = make(num_blocks=100, max_num_seqs=1, budget=8)
    long = sequence(100, first=5000)
    scheduler.add(long)
    for number in range(200):
        arrival = 0.01 * number
        scheduler.add(sequence(4, first=10 * number, arrival=arrival))
        step(scheduler, max_tokens=1)
        if long in scheduler.running:
            break
    assert 0 < arrival <= 100 * SECONDS_A_TOKEN + 0.02


def test_an_owner_gives_way_only_until_both_run_as_many() -> None:
    """Otherwise the two would preempt each other in turns."""
    scheduler = make(num_blocks=400, max_num_seqs=8, budget=64)
    for i in range(20):
        scheduler.add(sequence(8, first=20 * i, owner="a"))
    step(scheduler, max_tokens=10**6)
    for i in range(20, 40):
        scheduler.add(sequence(8, first=20 * i, owner="b"))
    num_preempted = 0
    for _ in range(30):
        num_preempted += len(step(scheduler, max_tokens=10**6).preempted)
    running = Counter(s.request.owner for s in scheduler.running)
    assert running == {"a": 4, "b": 4}
    assert num_preempted == 4


def test_background_work_of_one_owner_does_not_preempt_what_is_interactive() -> None:
    scheduler = make(max_num_seqs=2, budget=16)
    for i in range(2):
        scheduler.add(sequence(4, first=20 * i, owner="a"))
    step(scheduler)
    scheduler.add(sequence(4, first=60, owner="b", interactive=False))
    assert step(scheduler).preempted == []


def test_two_thousand_requests_that_wait_for_an_adapter_are_asked_about_once_a_step() -> None:
    scheduler = make(num_blocks=100)
    for i in range(2000):
        scheduler.add(sequence(4, "away", first=i))
    served = sequence(4, first=9000)
    scheduler.add(served)
    asked: list[Sequence] = []

    def admit(candidate: Sequence) -> Admission:
        asked.append(candidate)
        return Admission.LATER if candidate.request.selection.task_digest else Admission.NOW

    run(scheduler, scheduler.schedule(admit))
    assert len(asked) == 2
    assert scheduler.running == [served]


def test_prompts_take_no_more_tokens_than_the_step_has_time_for() -> None:
    scheduler = make(num_blocks=200, max_num_seqs=4, budget=64)
    decoding = sequence(2)
    scheduler.add(decoding)
    step(scheduler)
    scheduler.add(sequence(50, first=100))
    chunks = scheduler.schedule(now, max_prompt_tokens=5).chunks
    assert [(chunk.sequence is decoding, chunk.count) for chunk in chunks] == [
        (True, 1),
        (False, 5),
    ]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 9)), max_size=40))
def test_the_shares_of_members_that_are_present_count_from_the_least_served(
    acts: list[tuple[str, int]],
) -> None:
    """-1: leaves; 0: comes once more; else it is charged so many tokens."""
    shares = Shares()
    present: Counter[str] = Counter()
    for member, act in acts:
        before = {other: shares.served(other) for other in present}
        if act == 0:
            shares.enter(member)
            if member not in present and before:
                assert shares.served(member) >= min(before.values())
            present[member] += 1
        elif act < 0 and present[member]:
            shares.leave(member)
            present[member] -= 1
            present += Counter()  # without zeros
        elif present[member]:
            shares.charge(member, act)
            assert shares.served(member) == before[member] + act
        present += Counter()
        assert len(shares) == len(present)
        assert all(shares.served(other) >= 0 for other in present)


def test_a_member_that_left_for_a_moment_has_not_lost_what_it_had_too_much() -> None:
    shares = Shares()
    for member in "ab":
        shares.enter(member)
    shares.charge("a", 100)
    shares.leave("a")
    shares.enter("a")
    assert shares.served("a") - shares.served("b") == 100
    shares.leave("b")
    shares.enter("b")
    assert shares.served("b") == 100, "nobody saves up turns while away"
