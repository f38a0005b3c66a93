"""server.engine.native.scheduler: within the budget, in order, blocks for all that is computed, and nobody waits for ever."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crma.core.selection import AdapterSelection
from server.engine.native.block_pool import BlockPool, root_key
from server.engine.native.scheduler import Scheduler
from server.engine.native.step import Step
from server.engine.native.step_planner import Admission
from server.engine.native.sequence import Sequence
from server.engine.request import Request, SamplingParams

BLOCK, LONGEST = 2, 12


def make(num_blocks: int = 30, max_num_seqs: int = 3, budget: int = 8) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks + 1, BLOCK),
        max_num_seqs,
        budget,
        lambda selection: root_key(*selection),
    )


def sequence(
    length: int = 4, task: str | None = None, first: int = 0, n: int = 1, interactive: bool = True
) -> Sequence:
    prompt, sampling = tuple(range(first, first + length)), SamplingParams(n=n)
    return Sequence(
        Request("r", prompt, (), sampling, AdapterSelection(task), interactive=interactive), 0
    )


def run(scheduler: Scheduler, step: Step) -> None:
    """What the engine does after a forward pass: each chunk that ends at the newest token gets one more."""
    scheduler.computed(step)
    for chunk in step.chunks:
        if chunk.sequence.num_pending_tokens == 0:
            chunk.sequence.token_ids.append(7)


def now(_: Sequence) -> Admission:
    return Admission.NOW


class Schedules(RuleBasedStateMachine):
    """Any order of arrivals, steps and ends; an adapter that is away now and then."""

    @initialize(
        num_blocks=st.integers(10, 30),
        max_num_seqs=st.integers(1, 4),
        budget=st.sampled_from([4, 7, 30]),
    )
    def start(self, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        self.scheduler = make(num_blocks, max_num_seqs, budget)
        self.present = True

    @rule(
        length=st.integers(1, LONGEST),
        task=st.sampled_from([None, "away"]),
        first=st.integers(0, 1),
        interactive=st.booleans(),
    )
    def add(self, length: int, task: str | None, first: int, interactive: bool) -> None:
        self.scheduler.add(sequence(length, task, first, interactive=interactive))

    @rule()
    def toggle(self) -> None:
        self.present = not self.present

    def admit(self, waiting: Sequence) -> Admission:
        return (
            Admission.NOW
            if self.present or waiting.request.selection.task_digest is None
            else Admission.LATER
        )

    @rule()
    def step(self) -> None:
        before, queue = list(self.scheduler.running), list(self.scheduler.waiting)
        step = self.scheduler.schedule(self.admit)
        assert sum(chunk.count for chunk in step.chunks) <= self.scheduler.max_num_batched_tokens
        assert all(chunk.count > 0 for chunk in step.chunks)
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks)
        assert step.chunks or not before, "something runs and nothing is computed"
        for chunk in step.chunks:
            assert chunk.start == chunk.sequence.num_computed_tokens < len(chunk.sequence.token_ids)
            assert len(chunk.sequence.block_table) * BLOCK >= chunk.start + chunk.count
        decoding = [s for s in before if s.num_pending_tokens == 1 and s not in step.preempted]
        assert {*decoding} <= {chunk.sequence for chunk in step.chunks}, "a decode was left out"
        started = [s for s in queue if s in self.scheduler.running]
        queue.sort(key=lambda s: not s.request.interactive)
        could = [s for s in queue if self.admit(s) is Admission.NOW]
        assert {*started} == {*could[: len(started)]}, (
            "not in the order of arrival, what is interactive first"
        )
        gave_way = [s.request.interactive for s in step.preempted]
        assert not (any(gave_way) and started), "one gives way while another starts"
        assert not gave_way or all(s.request.interactive for s in started[:1]), (
            "one gives way to its equal"
        )
        assert not any(gave_way) or not any(
            not s.request.interactive for s in self.scheduler.running
        )
        waits = [s for s in queue if s.request.interactive and s not in started][:1]
        before_it = [
            c.count for c in step.chunks if c.sequence.request.interactive or c.sequence in decoding
        ]
        if (
            waits
            and waits[0] in could
            and not gave_way
            and sum(before_it) < self.scheduler.max_num_batched_tokens
        ):
            running = [s for s in self.scheduler.running if s.request.interactive]
            blocks = self.scheduler.blocks
            free = blocks.capacity - sum(len(s.block_table) for s in running)
            fits = blocks.blocks_for(len(waits[0].token_ids)) + len(running) <= free
            assert not fits or len(running) == self.scheduler.max_num_seqs, (
                "it waits for what is not interactive"
            )
        assert Counter(s for s in step.preempted if s in self.scheduler.waiting) == Counter(
            step.preempted
        )
        run(self.scheduler, step)

    @rule(data=st.data())
    @precondition(lambda self: self.scheduler.unfinished())
    def end(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(self.scheduler.unfinished())))

    def remove(self, ended: Sequence) -> None:
        was_running = ended in self.scheduler.running
        assert self.scheduler.remove(ended) is was_running

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        for running in list(self.scheduler.running):
            if (
                len(running.token_ids) > LONGEST + 4
            ):  # never over what the cache holds, as the engine sees to
                self.remove(running)

    def teardown(self) -> None:
        """Everybody is served: the oldest never gives way to its equals, so it ends; the next is the oldest then."""
        self.present = True
        for _ in range(40 * len(self.scheduler.unfinished())):
            self.step()
            self.books_balance()
        assert not self.scheduler.unfinished()
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.capacity


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    derandomize=True, max_examples=60, stateful_step_count=30, deadline=None
)


def test_a_prompt_is_computed_in_chunks_beside_what_decodes() -> None:
    scheduler, short, long = make(budget=5), sequence(2), sequence(12, first=50)
    scheduler.add(short)
    run(scheduler, scheduler.schedule(now))
    scheduler.add(long)
    chunks = []
    for _ in range(4):
        step = scheduler.schedule(now)
        chunks.append([(c.sequence is long, c.start, c.count, c.samples) for c in step.chunks])
        run(scheduler, step)
    assert chunks[0] == [(False, 2, 1, True), (True, 0, 4, False)]
    assert chunks[2] == [(False, 4, 1, True), (True, 8, 4, True)]
    assert chunks[3] == [(False, 5, 1, True), (True, 12, 1, True)]


def test_a_known_beginning_is_not_computed_again_but_only_under_the_same_adapters() -> None:
    scheduler, found = make(max_num_seqs=1), []
    for task in ("a", "b", "a", None):
        asks = sequence(7, task)
        scheduler.add(asks)
        run(scheduler, scheduler.schedule(now))
        found.append(asks.num_cached_tokens)
        scheduler.remove(asks)
    assert found == [0, 0, 6, 0], "all full blocks; the last token is always computed"


def test_the_n_sequences_of_a_request_wait_for_the_first_to_compute_their_prompt() -> None:
    scheduler, leader = make(), sequence(7, n=2)
    follower = Sequence(leader.request, 1)
    for each in (leader, follower):
        scheduler.add(each)
    run(scheduler, scheduler.schedule(now))
    assert scheduler.running == [leader]
    scheduler.schedule(now)
    assert (scheduler.running, follower.num_cached_tokens) == ([leader, follower], 6)


def test_who_waits_for_an_adapter_is_passed_and_counts_it_until_it_holds_the_others_up() -> None:
    scheduler, away = make(max_num_seqs=9, budget=30), sequence(task="away")
    answers = {away: Admission.LATER}
    for each in (sequence(), away, sequence(), sequence()):
        scheduler.add(each)
    assert len(scheduler.schedule(lambda s: answers.get(s, Admission.NOW)).chunks) == 3
    assert away.num_overtaken == 2
    answers[away] = Admission.HOLD
    scheduler.add(sequence())
    scheduler.schedule(lambda s: answers.get(s, Admission.NOW))
    assert (len(scheduler.running), len(scheduler.waiting)) == (3, 2)


def test_the_newest_gives_way_and_comes_back_first() -> None:
    scheduler = make(num_blocks=6)
    old, new, later = sequence(4), sequence(4, first=20), sequence(4, first=40)
    for each in (old, new, later):
        scheduler.add(each)
    preempted: list[Sequence] = []
    while not preempted:
        step = scheduler.schedule(now)
        preempted = step.preempted
        run(scheduler, step)
    assert preempted == [new]
    assert list(scheduler.waiting) == [new, later]
    assert (new.block_table, new.num_computed_tokens) == ([], 0)


def test_what_is_not_interactive_gives_its_place_to_what_is_and_takes_it_again() -> None:
    scheduler = make(max_num_seqs=2)
    slow = [sequence(4, first=20 * i, interactive=False) for i in range(3)]
    quick = sequence(4, first=80)
    for each in slow:
        scheduler.add(each)
    run(scheduler, scheduler.schedule(now))
    scheduler.add(quick)
    step = scheduler.schedule(now)
    assert (step.preempted, scheduler.running) == ([slow[1]], [slow[0], quick])
    assert {chunk.sequence for chunk in step.chunks} == {slow[0], quick}
    run(scheduler, step)
    assert not scheduler.schedule(now).preempted
    scheduler.remove(quick)
    scheduler.schedule(now)
    assert scheduler.running == [slow[0], slow[1]]


def test_an_adapter_that_is_away_takes_nobodys_place() -> None:
    scheduler, slow, quick = (
        make(max_num_seqs=1),
        sequence(interactive=False),
        sequence(task="away", first=20),
    )
    for each in (slow, quick):
        scheduler.add(each)
    answers = {quick: Admission.LATER}
    for _ in range(2):
        step = scheduler.schedule(lambda s: answers.get(s, Admission.NOW))
        assert (scheduler.running, step.preempted) == ([slow], [])
        run(scheduler, step)


def test_log_probabilities_of_a_prompts_end_leave_its_beginning_to_the_cache() -> None:
    scheduler, prompt, found = make(), tuple(range(9)), []
    for first in (1, 1, 5, 6):
        asked = Sequence(
            Request("r", prompt, (), SamplingParams(prompt_logprobs=0, prompt_logprobs_from=first)),
            0,
        )
        scheduler.add(asked)
        step = scheduler.schedule(now)
        found.append([(chunk.start, chunk.num_logits) for chunk in step.chunks])
        run(scheduler, step)
        while asked.num_pending_tokens > 1:
            run(scheduler, scheduler.schedule(now))
        scheduler.remove(asked)
    assert found == [[(0, 8)], [(0, 8)], [(4, 5)], [(4, 4)]]
