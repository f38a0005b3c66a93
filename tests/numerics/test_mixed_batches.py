"""Solo = batched: whatever else the engine runs, a request gets what it gets alone.

That holds for any mix of selections, lengths, arrivals, chunks, preemptions and cancellations.
"""

from dataclasses import replace
from functools import cache

import pytest
import tiny
import tiny_configs
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from schedules import SELECTIONS, Answer, Call, World, calls, mismatches, prompt, run

from crma.core.selection import BASE, AdapterSelection
from crma.method.lora import Lora
from server.engine.request import FinishReason, SamplingParams

TOLERANCE = 1e-4  # of a log-probability, in fp32
PLAIN = SamplingParams(6, logprobs=2)
PROMPTS = st.builds(prompt, st.integers(1, 24), st.integers(0, 1))  # many share a prefix
LIMITS = {
    "max_num_seqs": st.integers(1, 4),
    "max_num_batched_tokens": st.sampled_from([4, 9, 24, 64]),
    "block_size": st.sampled_from([1, 4, 8]),
    # Tokens in the KV cache: room for one long sequence, for barely two, or for all.
    "room": st.sampled_from([48, 56, 160]),
    "max_resident": st.integers(2, 5),
    "prefix_caching": st.sampled_from([True, True, False]),
}
SCHEDULES = {
    "schedule": st.lists(calls(PROMPTS, 20), min_size=4, max_size=9),
    "limits": st.fixed_dictionaries(LIMITS),
}


def examples(number: int) -> settings:
    """So many examples, always the same. Without shrinking, which takes minutes."""
    return settings(derandomize=True, max_examples=number, deadline=None, phases=[Phase.generate])


@cache
def world(family: str) -> World:
    return World(tiny.injection(family), tiny.adapters(tiny.injection(family)))


def check(world: World, answered: list[tuple[Call, int, Answer]]) -> None:
    for call, index, answer in answered:
        wrong = mismatches(world, answer, call, index, TOLERANCE)
        assert not wrong, (wrong, call, index, answer)


@pytest.mark.parametrize("family", [*tiny_configs.FAMILIES, *tiny_configs.SCALED])
@examples(5)
@given(**SCHEDULES)
def test_every_request_gets_what_it_gets_alone(
    family: str, schedule: list[Call], limits: dict[str, int]
) -> None:
    """Ties of greedy decoding are no excuse for another token.

    Rounding is about 1e-6, and the two best logits of these models are half a unit apart on
    average, so rounding decides one token in some 300,000. These fixed examples have 600.
    """
    answered, _ = run(world(family), schedule, **limits)
    check(world(family), answered)


@pytest.mark.e2e
@pytest.mark.parametrize("family", [*tiny_configs.FAMILIES, *tiny_configs.SCALED])
@examples(60)
@given(**SCHEDULES)
def test_every_request_gets_what_it_gets_alone_in_more_schedules(
    family: str, schedule: list[Call], limits: dict[str, int]
) -> None:
    answered, _ = run(world(family), schedule, **limits)
    check(world(family), answered)


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_long_sequence_runs_beside_short_ones(family: str, block_size: int) -> None:
    prompts = [(5, 0), (253, 1), (305, 3)]  # length, arrival
    sampling = replace(PLAIN, max_tokens=7)
    schedule = [
        Call(SELECTIONS[i + 1], prompt(length), sampling, arrival=arrival)
        for i, (length, arrival) in enumerate(prompts)
    ]
    limits = {"room": 720, "block_size": block_size, "max_num_seqs": 3, "max_resident": 5}
    answered, _ = run(world(family), schedule, **limits)
    check(world(family), answered)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_no_keys_and_values_are_shared_between_selections(prefix_caching: bool) -> None:
    """The same prompt under every selection, one after the other.

    They differ in the task, in CRMA on or off, or only in the digest of a task published anew. The
    first ones come once more at the end, and may find their own keys and values.
    """
    selections = [*SELECTIONS, AdapterSelection("task-0", "crma-1"), SELECTIONS[0], SELECTIONS[2]]
    schedule = [Call(s, prompt(30), PLAIN, arrival=20 * i) for i, s in enumerate(selections)]
    limits = {"room": 800, "max_num_seqs": 1, "prefix_caching": prefix_caching}
    answered, _ = run(world("llama"), schedule, **limits)
    check(world("llama"), answered)
    seen: dict[AdapterSelection, tuple[float, ...]] = {}
    for call, _, answer in answered:
        seen[call.selection] = tuple(round(one.logprob, 3) for one in answer.logprobs)
    assert len(set(seen.values())) == len(set(selections))


def test_an_adapter_that_overflows_harms_no_other_request() -> None:
    """Finite weights can give NaN: an error, and no answer.

    Nor may the NaN stay in a block for the next sequence, even masked: 0 · NaN is NaN.
    """
    there = World(tiny.injection(), {"broken": tiny.overflowing()})
    broken = AdapterSelection("broken")
    bad = [Call(broken, prompt(20), PLAIN, arrival=0), Call(broken, prompt(9), PLAIN, arrival=1)]
    good = [Call(BASE, prompt(n), PLAIN, arrival=at) for n, at in ((7, 0), (1, 2), (4, 9))]
    answered, _ = run(there, bad + good, room=40, block_size=4, max_num_seqs=2)
    for _, _, answer in answered[:2]:
        assert (answer.reason, answer.tokens) == (FinishReason.ERROR, [])
    check(there, answered[2:])


def huge(a: float, b: float, seed: int) -> Lora:
    """A random LoRA whose numbers are up to so large."""
    made = tiny.lora(tiny.injection(), 2, "all-linear", seed)
    pairs = {
        path: replace(pair, A=pair.A.sign() * a, B=pair.B.sign() * b)
        for path, pair in made.pairs.items()
    }
    return Lora(made.config, pairs)


@pytest.mark.parametrize(
    ("a", "b", "native"),
    [
        (1.0, 3e38, True),
        (1.0, 3e38, False),
        (3e38, 1.0, True),
        (1e20, 1e18, True),
        (1.0, 1.6e38, True),
    ],
)
def test_of_96_requests_those_beside_an_adapter_of_huge_weights_get_what_they_get_alone(
    a: float, b: float, native: bool
) -> None:
    """Once 53 of 96 failed: B times its scaling was infinite, and masked zeros times it NaN.

    Either the adapter is refused, or its own requests overflow.
    """
    adapters = {**tiny.adapters(tiny.injection()), "huge": huge(a, b, 3)}
    there = World(tiny.injection(), adapters)
    neighbours = [
        Call(SELECTIONS[i % 8], prompt(1 + i % 17, i % 3), PLAIN, arrival=i // 8) for i in range(80)
    ]
    bad = [
        Call(AdapterSelection("huge", crma), prompt(1 + i, i % 3), PLAIN, arrival=i // 2)
        for i in range(8)
        for crma in (None, "crma-0")
    ]
    mixed = [*neighbours[:40], *bad, *neighbours[40:]]
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_resident": 6, "room": 1600}
    answered, _ = run(there, mixed, native=native, **limits)
    harmed = [call for call, *_ in answered if call not in bad]
    check(there, [each for each in answered if each[0] not in bad])
    assert len(harmed) == 80
    reasons = {answer.reason for call, _, answer in answered if call in bad}
    assert reasons == {FinishReason.ERROR}
