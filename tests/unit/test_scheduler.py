"""server.engine.scheduler: first come, first served, within the limits, and no slot given twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.request import FinishReason, Request
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

lengths = st.integers(1, 12)


def sequence(length: int, name: str = "r") -> Sequence:
    return Sequence(Request(name, (0,) * length), 0)


def padded(sequences: list[Sequence]) -> int:
    return len(sequences) * max(len(s.request.prompt_ids) for s in sequences)


class SchedulerMachine(RuleBasedStateMachine):
    """A model of two lists beside the real one; any order of calls."""

    @initialize(max_num_seqs=st.integers(1, 4), budget=st.sampled_from([1, 8, 16, 30]))
    def start(self, max_num_seqs: int, budget: int) -> None:
        self.scheduler = Scheduler(max_num_seqs, budget)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @rule(length=lengths)
    def add(self, length: int) -> None:
        self.waiting.append(sequence(length))
        self.scheduler.add(self.waiting[-1])

    @rule()
    @precondition(lambda self: self.waiting or self.running)
    def schedule(self) -> None:
        step = self.scheduler.schedule()
        chosen, free = list(step.sequences), self.scheduler.max_num_seqs - len(self.running)
        if not step.is_prefill:
            assert chosen == self.running
            assert not (self.waiting and free), "a prompt waits beside a free slot"
            return
        assert chosen == self.waiting[: len(chosen)], "not in the order of arrival"
        budget = self.scheduler.max_num_batched_tokens
        assert len(chosen) == 1 or padded(chosen) <= budget
        more = self.waiting[: len(chosen) + 1]
        assert len(chosen) in (free, len(self.waiting)) or padded(more) > budget, "room was left unused"
        self.waiting = self.waiting[len(chosen) :]
        self.running += chosen

    @rule(data=st.data(), reason=st.sampled_from(FinishReason))
    @precondition(lambda self: self.waiting or self.running)
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        """Finished, failed or aborted, wherever it is."""
        ended = data.draw(st.sampled_from(self.waiting + self.running))
        self.scheduler.remove(ended)
        ended.finish_reason = reason
        (self.waiting if ended in self.waiting else self.running).remove(ended)
        assert ended.slot is None

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert list(self.scheduler.waiting) == self.waiting
        assert self.scheduler.running == self.running
        assert self.scheduler.has_work() == bool(self.waiting or self.running)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(derandomize=True, max_examples=60, stateful_step_count=30, deadline=None)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(work=st.lists(st.tuples(lengths, st.integers(1, 5), st.integers(0, 2)), max_size=15), slots=st.integers(1, 3))
def test_nothing_starves(work: list[tuple[int, int, int]], slots: int) -> None:
    """Each needs some decodes, and others keep coming; all start in the order they came, and all end."""
    scheduler = Scheduler(slots, 16)
    coming = [(sequence(length), decodes, gap) for length, decodes, gap in work]
    left = {s: decodes for s, decodes, _ in coming}
    started: list[Sequence] = []
    for _ in range(sum(decodes + gap + 2 for _, decodes, gap in work)):
        for s, _, gap in coming[:1]:
            if gap <= 0:
                scheduler.add(s)
            coming[0] = (s, 0, gap - 1)
            coming = coming[1:] if gap <= 0 else coming
        step = scheduler.schedule()
        started += step.sequences if step.is_prefill else []
        for s in step.sequences:
            left[s] -= not step.is_prefill
            if not left[s]:
                scheduler.remove(s)
    assert (started, set(left.values()) | {0}) == (list(left), {0})


def test_a_request_is_found_wherever_its_sequences_are() -> None:
    scheduler = Scheduler(1, 16)
    mine = [sequence(3, "mine") for _ in range(2)]
    for s in (mine[0], sequence(3, "other"), mine[1]):
        scheduler.add(s)
    scheduler.schedule()
    assert set(scheduler.find("mine")) == set(mine)
    assert [s.slot is None for s in mine] == [False, True]
