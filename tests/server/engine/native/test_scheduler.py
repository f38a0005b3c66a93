"""server.engine.native.scheduler: budget, order, preemption, block allocation and prefix reuse.

It tests step_planner, step and block_tables along with it: they have no other caller. How owners
and adapters share the engine is in test_fairness.
"""

from collections.abc import Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import BLOCK_SIZE, make, now, run, sequence

from server.engine.native.sequence import Sequence
from server.engine.native.step import Step
from server.engine.native.step_planner import Admission

MAX_PROMPT = 12


def is_interactive(sequence: Sequence) -> bool:
    return sequence.request.interactive


def line_of(sequence: Sequence) -> Any:
    """What sequences have in common that start in the order in which they are due."""
    request = sequence.request
    return request.interactive, request.owner, request.selection


class Schedules(RuleBasedStateMachine):
    """Arrivals, steps and ends in any order; the adapter "away" is sometimes not resident."""

    @initialize(
        num_blocks=st.integers(10, 30),
        max_num_seqs=st.integers(1, 4),
        budget=st.sampled_from([4, 7, 30]),
        owners=st.sampled_from([("",), ("",), ("", "a", "b")]),
    )
    def start(
        self, num_blocks: int, max_num_seqs: int, budget: int, owners: tuple[str, ...]
    ) -> None:
        self.scheduler = make(num_blocks, max_num_seqs, budget)
        self.is_resident = True
        self.owners = owners
        self.places: dict[Sequence, float] = {}  # in its line: the lowest starts first

    @rule(
        length=st.integers(1, MAX_PROMPT),
        task=st.sampled_from([None, "away"]),
        first=st.integers(0, 1),
        interactive=st.booleans(),
        owner=st.integers(0, 2),
    )
    def add(self, length: int, task: str | None, first: int, interactive: bool, owner: int) -> None:
        name = self.owners[owner % len(self.owners)]
        added = sequence(length, task, first, interactive=interactive, owner=name)
        self.places[added] = length + len(self.places) / 10**6  # they all arrived at once
        self.scheduler.add(added)

    @rule()
    def toggle_residency(self) -> None:
        self.is_resident = not self.is_resident

    def admit(self, waiting: Sequence) -> Admission:
        needs_away = waiting.request.selection.task_digest is not None
        if needs_away and not self.is_resident:
            return Admission.LATER
        return Admission.NOW

    @rule()
    def step(self) -> None:
        running = list(self.scheduler.running)
        queue = list(self.scheduler.waiting)
        step = self.scheduler.schedule(self.admit)
        started = [s for s in queue if s in self.scheduler.running]
        decoding = [s for s in running if not s.is_prefilling and s not in step.preempted]
        self.check_chunks(step)
        assert step.chunks or not running, "sequences run, and nothing is computed"
        computed = {chunk.sequence for chunk in step.chunks}
        assert set(decoding) <= computed, "a sequence in decode was left out"
        self.check_order(queue, started)
        self.check_preemption(step, started)
        self.check_room_for_interactive(step, queue, started, decoding)
        for victim in step.preempted:
            self.places[victim] = min(0.0, *self.places.values()) - 1
        run(self.scheduler, step)

    def check_chunks(self, step: Step) -> None:
        """Within the budget, one a sequence, at the first token to compute, with blocks."""
        counts = [chunk.count for chunk in step.chunks]
        assert sum(counts) <= self.scheduler.max_num_batched_tokens
        assert all(count > 0 for count in counts)
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            computed = chunk.sequence.num_computed_tokens
            assert chunk.start == computed < len(chunk.sequence.token_ids)
            room = len(chunk.sequence.block_table) * BLOCK_SIZE
            assert room >= chunk.start + chunk.count

    def check_order(self, queue: list[Sequence], started: list[Sequence]) -> None:
        """Interactive requests start first, and of those alike the one that is due first."""
        could_start = [s for s in queue if self.admit(s) is Admission.NOW]
        if not all(is_interactive(s) for s in started):
            assert {s for s in could_start if is_interactive(s)} <= set(started)
        lines: dict[Any, list[Sequence]] = {}
        for each in sorted(could_start, key=self.places.__getitem__):
            lines.setdefault(line_of(each), []).append(each)
        for line in lines.values():
            started_here = [s for s in line if s in started]
            assert started_here == line[: len(started_here)]

    def check_preemption(self, step: Step, started: list[Sequence]) -> None:
        preempted = step.preempted
        assert len(set(preempted)) == len(preempted)
        assert set(preempted) <= set(self.scheduler.waiting)
        if len(self.owners) > 1 and started:
            return  # an owner may give way to another
        if any(is_interactive(s) for s in preempted):
            assert not started, "an interactive request is preempted while another starts"
            running = self.scheduler.running
            assert all(is_interactive(s) for s in running), "background work should go first"
        if preempted:
            assert all(is_interactive(s) for s in started), "background work starts in its place"

    def check_room_for_interactive(
        self, step: Step, queue: list[Sequence], started: list[Sequence], decoding: list[Sequence]
    ) -> None:
        """The first interactive request in the queue never waits for background work."""
        waiting = [s for s in queue if is_interactive(s) and s not in started]
        waiting.sort(key=self.places.__getitem__)
        if len(set(map(line_of, waiting))) != 1 or step.preempted:
            return
        if self.admit(waiting[0]) is not Admission.NOW:
            return
        before_it = [c for c in step.chunks if is_interactive(c.sequence) or c.sequence in decoding]
        if sum(c.count for c in before_it) >= self.scheduler.max_num_batched_tokens:
            return
        running = [s for s in self.scheduler.running if is_interactive(s)]
        blocks = self.scheduler.blocks
        num_free = blocks.capacity - sum(len(s.block_table) for s in running)
        num_needed = blocks.blocks_for(len(waiting[0].token_ids)) + len(running)
        has_room = num_needed <= num_free and len(running) != self.scheduler.max_num_seqs
        assert not has_room, "it waits for background work"

    @rule(data=st.data())
    @precondition(lambda self: self.scheduler.unfinished())
    def end(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(self.scheduler.unfinished())))

    def remove(self, ended: Sequence) -> None:
        was_running = ended in self.scheduler.running
        assert self.scheduler.remove(ended) is was_running

    @invariant()
    def accounts_balance(self) -> None:
        self.scheduler.check_integrity()
        # The engine ends every sequence before it outgrows the cache.
        for running in list(self.scheduler.running):
            if len(running.token_ids) > MAX_PROMPT + 4:
                self.remove(running)

    def teardown(self) -> None:
        """All are served: the oldest is never preempted by its equals, and ends; then the next is.

        At the end every block is free.
        """
        self.is_resident = True
        for _ in range(40 * len(self.scheduler.unfinished())):
            self.step()
            self.accounts_balance()
        assert not self.scheduler.unfinished()
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.capacity


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    derandomize=True, max_examples=60, stateful_step_count=30, deadline=None
)


def test_a_prompt_is_computed_in_chunks_beside_sequences_in_decode() -> None:
    scheduler = make(budget=5)
    short = sequence(2)
    long = sequence(12, first=50)
    scheduler.add(short)
    run(scheduler, scheduler.schedule(now))
    scheduler.add(long)
    steps = []
    for _ in range(4):
        step = scheduler.schedule(now)
        steps.append([(c.sequence is long, c.start, c.count, c.samples) for c in step.chunks])
        run(scheduler, step)
    assert steps[0] == [(False, 2, 1, True), (True, 0, 4, False)]
    assert steps[2] == [(False, 4, 1, True), (True, 8, 4, True)]
    assert steps[3] == [(False, 5, 1, True), (True, 12, 1, True)]


def test_a_cached_prefix_is_reused_only_under_the_same_adapters() -> None:
    scheduler = make(max_num_seqs=1)
    num_cached = []
    for task in ("a", "b", "a", None):
        asked = sequence(7, task)
        scheduler.add(asked)
        run(scheduler, scheduler.schedule(now))
        num_cached.append(asked.num_cached_tokens)
        scheduler.remove(asked)
    assert num_cached == [0, 0, 6, 0], "all full blocks; the last token is always computed"


def test_a_cached_prefix_is_shared_only_under_the_same_salt() -> None:
    """`cached_tokens` must not tell whether another tenant has sent the same beginning."""
    scheduler = make(max_num_seqs=1)
    num_cached = []
    for task, salt in [(None, "a"), (None, "b"), ("a", ""), (None, ""), (None, "a"), (None, "")]:
        asked = sequence(7, task, cache_salt=salt)
        scheduler.add(asked)
        run(scheduler, scheduler.schedule(now))
        num_cached.append(asked.num_cached_tokens)
        scheduler.remove(asked)
    assert num_cached == [0, 0, 0, 0, 6, 6]


def test_the_n_sequences_of_a_request_wait_for_the_first_to_compute_their_prompt() -> None:
    scheduler = make()
    leader = sequence(7, n=2)
    follower = Sequence(leader.request, 1)
    scheduler.add(leader)
    scheduler.add(follower)
    run(scheduler, scheduler.schedule(now))
    assert scheduler.running == [leader]
    scheduler.schedule(now)
    assert scheduler.running == [leader, follower]
    assert follower.num_cached_tokens == 6


def test_a_sequence_that_waits_for_an_adapter_is_overtaken_until_it_is_held() -> None:
    scheduler = make(max_num_seqs=9, budget=30)
    away = sequence(task="away")
    answers = {away: Admission.LATER}
    for each in (sequence(), away, sequence(), sequence()):
        scheduler.add(each)
    step = scheduler.schedule(lambda s: answers.get(s, Admission.NOW))
    assert len(step.chunks) == 3
    assert away.num_overtaken == 2
    answers[away] = Admission.HOLD
    scheduler.add(sequence())
    scheduler.schedule(lambda s: answers.get(s, Admission.NOW))
    assert len(scheduler.running) == 3
    assert len(scheduler.waiting) == 2


def test_the_newest_sequence_is_preempted_and_returns_first() -> None:
    scheduler = make(num_blocks=6)
    old = sequence(4)
    new = sequence(4, first=20)
    later = sequence(4, first=40)
    for each in (old, new, later):
        scheduler.add(each)
    preempted: list[Sequence] = []
    while not preempted:
        step = scheduler.schedule(now)
        preempted = step.preempted
        run(scheduler, step)
    assert preempted == [new]
    assert list(scheduler.waiting) == [new, later]
    assert new.block_table == []
    assert new.num_computed_tokens == 0


def test_a_background_request_is_preempted_by_an_interactive_one_and_resumes_after_it() -> None:
    scheduler = make(max_num_seqs=2)
    background = [sequence(4, first=20 * i, interactive=False) for i in range(3)]
    interactive = sequence(4, first=80)
    for each in background:
        scheduler.add(each)
    run(scheduler, scheduler.schedule(now))
    scheduler.add(interactive)
    step = scheduler.schedule(now)
    assert step.preempted == [background[1]]
    assert scheduler.running == [background[0], interactive]
    assert {chunk.sequence for chunk in step.chunks} == {background[0], interactive}
    run(scheduler, step)
    assert not scheduler.schedule(now).preempted
    scheduler.remove(interactive)
    scheduler.schedule(now)
    assert scheduler.running == [background[0], background[1]]


def test_the_tokens_of_a_preempted_sequence_go_to_the_one_that_takes_its_place() -> None:
    scheduler = make(max_num_seqs=1, budget=4)
    background = sequence(2, interactive=False)
    scheduler.add(background)
    run(scheduler, scheduler.schedule(now))
    interactive = sequence(4, first=20)
    scheduler.add(interactive)
    step = scheduler.schedule(now)
    assert [(chunk.sequence, chunk.count) for chunk in step.chunks] == [(interactive, 4)]


def test_a_sequence_whose_adapter_is_not_resident_preempts_nobody() -> None:
    scheduler = make(max_num_seqs=1)
    background = sequence(interactive=False)
    interactive = sequence(task="away", first=20)
    scheduler.add(background)
    scheduler.add(interactive)
    answers = {interactive: Admission.LATER}
    for _ in range(2):
        step = scheduler.schedule(lambda s: answers.get(s, Admission.NOW))
        assert scheduler.running == [background]
        assert step.preempted == []
        run(scheduler, step)


def test_prompt_log_probabilities_from_a_later_token_reuse_the_cached_prefix() -> None:
    scheduler = make()
    found = []
    for first in (1, 1, 5, 6):
        asked = sequence(9, prompt_logprobs=0, prompt_logprobs_from=first)
        scheduler.add(asked)
        step = scheduler.schedule(now)
        found.append([(chunk.start, chunk.num_logits) for chunk in step.chunks])
        run(scheduler, step)
        while asked.is_prefilling:
            run(scheduler, scheduler.schedule(now))
        scheduler.remove(asked)
    assert found == [[(0, 8)], [(0, 8)], [(4, 5)], [(4, 4)]]


def test_a_start_leaves_a_free_block_for_every_running_sequence() -> None:
    def starts_beside_two_others(num_blocks: int) -> bool:
        scheduler = make(num_blocks)
        for first in (100, 200):
            scheduler.add(sequence(1, first=first))
        run(scheduler, scheduler.schedule(now))  # each has one block, with room for a token
        third = sequence(4)
        scheduler.add(third)
        scheduler.schedule(now)
        return third in scheduler.running

    assert starts_beside_two_others(6)
    assert not starts_beside_two_others(5)


class _Counted(list[int]):
    """A block table that counts how often it is read as a whole."""

    num_reads = 0

    def __iter__(self) -> Iterator[int]:
        _Counted.num_reads += 1
        return super().__iter__()


def test_a_long_queue_does_not_read_the_blocks_of_running_sequences_for_each_of_its_lines() -> None:
    """2,000 waiting made a step 20 ms longer."""
    scheduler = make(num_blocks=100, max_num_seqs=3, budget=64)
    for first in (0, 20):
        scheduler.add(sequence(10, first=first, max_tokens=50))
    run(scheduler, scheduler.schedule(now))
    for running in scheduler.running:
        running.block_table = _Counted(running.block_table)
    for number in range(40):
        scheduler.add(sequence(8, f"away-{number % 20}", first=40 + number))
    _Counted.num_reads = 0
    asked: list[Sequence] = []

    def later(waiting: Sequence) -> Admission:
        asked.append(waiting)
        return Admission.LATER

    run(scheduler, scheduler.schedule(later))
    assert len(asked) == 20  # one for each adapter
    assert _Counted.num_reads <= 2 * len(scheduler.running)
