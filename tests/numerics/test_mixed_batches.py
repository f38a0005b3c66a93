"""Solo = batched: any mix of selections, lengths, arrivals, chunks, preemptions and cancellations gives each request
what it gets alone."""

from dataclasses import replace
from functools import cache

import pytest
import tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from schedules import SELECTIONS, Answer, Call, World, calls, mismatches, prompt, run

from crma.core.selection import BASE, AdapterSelection
from server.engine.request import FinishReason, SamplingParams

TOLERANCE = 1e-4  # of a log-probability, fp32
PLAIN = SamplingParams(6, logprobs=2)
PROMPTS = st.builds(prompt, st.integers(1, 24), st.integers(0, 1))  # many of which begin alike
LIMITS = {
    "max_num_seqs": st.integers(1, 4),
    "max_num_batched_tokens": st.sampled_from([4, 9, 24, 64]),
    "block_size": st.sampled_from([1, 4, 8]),
    "room": st.sampled_from(
        [48, 56, 160]
    ),  # tokens in the KV cache: one long sequence, hardly two, or all
    "max_resident": st.integers(2, 5),
    "prefix_caching": st.sampled_from([True, True, False]),
}


@cache
def world(family: str) -> World:
    return World(tiny.injection(family), tiny.adapters(tiny.injection(family)))


def check(world: World, answered: list[tuple[Call, int, Answer]]) -> None:
    for call, index, answer in answered:
        wrong = mismatches(world, answer, call, index, TOLERANCE)
        assert not wrong, (wrong, call, index, answer)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@settings(
    derandomize=True, max_examples=25, deadline=None, phases=[Phase.generate]
)  # shrinking takes minutes
@given(
    schedule=st.lists(calls(PROMPTS, 20), min_size=4, max_size=9),
    limits=st.fixed_dictionaries(LIMITS),
)
def test_every_request_gets_what_it_gets_alone(
    family: str, schedule: list[Call], limits: dict[str, int]
) -> None:
    """Greedy ties are not excused: rounding is about 1e-6 and the best two logits of these models are half a unit apart
    on average, so that rounding decides one token in some 300,000. These fixed examples have 3,000."""
    check(world(family), run(world(family), schedule, **limits)[0])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_long_sequence_beside_short_ones(family: str) -> None:
    lengths = [(5, 0), (253, 1), (305, 3)]
    schedule = [
        Call(SELECTIONS[i + 1], prompt(n), replace(PLAIN, max_tokens=7), arrival=at)
        for i, (n, at) in enumerate(lengths)
    ]
    check(world(family), run(world(family), schedule, room=720, max_num_seqs=3, max_resident=5)[0])


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_nothing_stays_behind_when_only_the_adapter_changes(prefix_caching: bool) -> None:
    """The same prompt again and again: other tasks, CRMA on and off, a task published anew under another digest, and
    the first ones once more, which find their own KV."""
    selections = [*SELECTIONS, AdapterSelection("task-0", "crma-1"), SELECTIONS[0], SELECTIONS[2]]
    schedule = [Call(s, prompt(30), PLAIN, arrival=20 * i) for i, s in enumerate(selections)]
    answered, _ = run(
        world("llama"), schedule, room=800, max_num_seqs=1, prefix_caching=prefix_caching
    )
    check(world("llama"), answered)
    seen = {
        call.selection: tuple(one.logprob for one in answer.logprobs)
        for call, _, answer in answered
    }
    assert len({tuple(round(p, 3) for p in each) for each in seen.values()}) == len(set(selections))


def test_an_adapter_that_overflows_harms_nobody_beside_it_or_after_it() -> None:
    """Finite weights can give NaN. That is an error and no answer; and a masked NaN in a block must not stay there for
    the next sequence: 0 · NaN is NaN."""
    there = World(tiny.injection(), {"broken": tiny.overflowing()})
    bad = [
        Call(AdapterSelection("broken"), prompt(n), PLAIN, arrival=at)
        for n, at in ((20, 0), (9, 1))
    ]
    good = [Call(BASE, prompt(n), PLAIN, arrival=at) for n, at in ((7, 0), (1, 2), (4, 9))]
    answered, _ = run(there, bad + good, room=40, block_size=4, max_num_seqs=2)
    assert [(answer.reason, answer.tokens) for _, _, answer in answered[:2]] == [
        (FinishReason.ERROR, [])
    ] * 2
    check(there, answered[2:])
