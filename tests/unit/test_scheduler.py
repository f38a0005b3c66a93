"""server.engine.scheduler: first come, first served, within the limits, and no slot given twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.request import FinishReason, Request
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence


def padded(sequences: list[Sequence]) -> int:
    return len(sequences) * max(len(s.request.prompt_ids) for s in sequences)


class SchedulerMachine(RuleBasedStateMachine):
    """A model of two lists beside the real one; any order of calls."""

    @initialize(max_num_seqs=st.integers(1, 4), budget=st.sampled_from([1, 8, 16, 30]))
    def start(self, max_num_seqs: int, budget: int) -> None:
        self.scheduler = Scheduler(max_num_seqs, budget)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @rule(length=st.integers(1, 12))
    def add(self, length: int) -> None:
        self.waiting.append(Sequence(Request("r", (0,) * length), 0))
        self.scheduler.add(self.waiting[-1])

    @rule()
    @precondition(lambda self: self.waiting or self.running)
    def schedule(self) -> None:
        self.step()

    def step(self) -> bool:
        """Whether it was a prefill."""
        step = self.scheduler.schedule()
        chosen, free = list(step.sequences), self.scheduler.max_num_seqs - len(self.running)
        if not step.is_prefill:
            assert chosen == self.running
            assert not (self.waiting and free), "a prompt waits beside a free slot"
            return False
        assert chosen == self.waiting[: len(chosen)], "not in the order of arrival"
        budget = self.scheduler.max_num_batched_tokens
        assert len(chosen) == 1 or padded(chosen) <= budget
        more = self.waiting[: len(chosen) + 1]
        assert len(chosen) in (free, len(self.waiting)) or padded(more) > budget, "room was left unused"
        self.waiting = self.waiting[len(chosen) :]
        self.running += chosen
        return True

    @rule(data=st.data(), reason=st.sampled_from(FinishReason))
    @precondition(lambda self: self.waiting or self.running)
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        """Finished, failed or aborted, wherever it is."""
        self.remove(data.draw(st.sampled_from(self.waiting + self.running)), reason)

    def remove(self, ended: Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(ended)
        ended.finish_reason = reason
        (self.waiting if ended in self.waiting else self.running).remove(ended)
        assert ended.slot is None

    def teardown(self) -> None:
        """Nothing starves: where a decode ends all that it ran, two steps for each that waits are enough."""
        for _ in range(2 * len(self.waiting) + 1):
            if self.scheduler.has_work() and not self.step():
                for ended in list(self.running):
                    self.remove(ended, FinishReason.LENGTH)
        assert not self.waiting + self.running

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert list(self.scheduler.waiting) == self.waiting
        assert self.scheduler.running == self.running
        assert self.scheduler.has_work() == bool(self.waiting or self.running)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(derandomize=True, max_examples=60, stateful_step_count=30, deadline=None)
