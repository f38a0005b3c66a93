"""A fault in a step ends the sequences that it can be pinned to; others get what they get alone.

The faults are in the code that really runs: a hook of the model, the sampler, the tokenizer, the
pool of adapters.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_configs
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from schedules import Answer, Call, World, mismatches, prompt
from tiny import PROMPT, ask
from transformers import PreTrainedTokenizerBase

from crma.core.selection import BASE, AdapterSelection
from server.engine.native import sampler, step_results
from server.engine.native.block_tables import BlockTables
from server.engine.native.engine import Engine, EngineFailed
from server.engine.native.sequence import Sequence
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams

SAMPLED = SamplingParams(8, temperature=1.0, seed=5, logprobs=2)
GREEDY = SamplingParams(8, logprobs=2)
NEIGHBOURS = [
    Call(BASE, (5, 9, 40), SAMPLED),
    Call(AdapterSelection("task-0", "crma-0"), prompt(30), GREEDY),
    Call(AdapterSelection("task-1"), prompt(17, 1), replace(SAMPLED, n=2)),
    Call(AdapterSelection(None, "crma-1"), prompt(9), replace(GREEDY, prompt_logprobs=1)),
    Call(BASE, prompt(3, 1), replace(SAMPLED, temperature=0.7, top_p=0.8)),
]
FAULT = RuntimeError("injected")
BASE_WORLD = World(tiny.injection(), {})


@pytest.fixture
def world() -> World:
    return World(tiny.injection(), tiny.adapters(tiny.injection()))


def run(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], Answer]:
    """The answer of every sequence; the engine's accounts balance after each step."""
    answers = {(r.id, index): Answer() for r in requests for index in range(r.sampling.n)}
    outputs: list[RequestOutput] = []
    for request in requests:
        outputs += engine.add(request)
    while engine.scheduler.unfinished():
        outputs += engine.step()
        engine.check_integrity()
    for output in outputs:
        answers[output.request_id, output.index].take(output)
    assert engine.pool.num_users() == 0
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.capacity
    return answers


def check(world: World, culprit: Request, spoil: Callable[[Engine], None]) -> None:
    """Run the culprit among its neighbours: it ends with an error, and nothing else changes."""
    limits = {"max_num_seqs": 8, "max_resident": 5, "num_blocks": 200}
    engine, pool = tiny.make_engine(world.injection, world.adapters, **limits)
    for digest in world.adapters:
        pool.load(digest)
    spoil(engine)
    requests = [world.request(str(i), call) for i, call in enumerate(NEIGHBOURS)]
    answers = run(engine, [*requests[:2], culprit, *requests[2:]])
    assert answers[culprit.id, 0].reason is FinishReason.ERROR
    for number, call in enumerate(NEIGHBOURS):
        for index in range(call.sampling.n):
            answer = answers[str(number), index]
            assert not mismatches(world, answer, call, index, 1e-4), (number, index, answer)
    again = run(engine, [ask("again", logprobs=2)])
    assert again["again", 0].reason is FinishReason.LENGTH, "the engine goes on"


def tokens_of_neighbours(world: World) -> set[int]:
    """Every token of their prompts, and of their answers alone."""
    tokens: set[int] = set()
    for call in NEIGHBOURS:
        tokens.update(call.prompt)
        for index in range(call.sampling.n):
            tokens.update(world.alone(call, index, ()).token_ids)
    return tokens


def test_a_forward_pass_that_fails_at_one_token(world: World, caplog: Any) -> None:
    """A module's hook raises: in the decoder the embedding is a function, so take the modules."""
    world = World(tiny.injection("phi3"), tiny.adapters(tiny.injection("phi3")))
    poison = min(set(range(2, tiny_configs.VOCAB)) - tokens_of_neighbours(world))

    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == poison).any():
            raise FAULT

    handle = world.injection.model.get_input_embeddings().register_forward_pre_hook(hook)
    try:
        check(world, ask("bad", prompt=(5, poison, 7)), lambda _: None)
    finally:
        handle.remove()
    assert "injected" in caplog.text


def test_a_token_id_beyond_the_embedding(world: World) -> None:
    check(world, ask("bad", prompt=(5, tiny_configs.VOCAB, 7)), lambda _: None)


def test_a_batch_that_cannot_be_built(world: World) -> None:
    check(world, ask("bad", prompt=(5, 2**70, 7)), lambda _: None)


def test_sampling_options_that_raise(world: World) -> None:
    """The draws of the first try are taken back: seeded neighbours go on as they would have."""
    options: dict[str, Any] = {"temperature": 1.0, "top_k": "many"}
    check(world, ask("bad", **options), lambda _: None)


def test_sampling_that_raises_after_every_row_has_drawn(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sampler.sample
    culprit = ask("bad", prompt=(5, 6, 7), temperature=1.0)

    def sample(logits: torch.Tensor, rows: list[sampler.SamplingRow]) -> list[int]:
        tokens = plain(logits, rows)
        if any(row.prompt_ids == culprit.prompt_ids for row in rows):
            raise FAULT
        return tokens

    monkeypatch.setattr(step_results, "sample", sample)
    check(world, culprit, lambda _: None)


def test_log_probabilities_that_raise(world: World) -> None:
    options: dict[str, Any] = {"prompt_logprobs": "two"}
    check(world, ask("bad", **options), lambda _: None)
    options = {"logprobs": "two"}
    check(world, ask("bad", **options), lambda _: None)


class _Tokenizer:
    """The tiny tokenizer, which fails on one text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bad: int) -> None:
        self._tokenizer = tokenizer
        self._bad = bad

    @property
    def backend_tokenizer(self) -> Any:
        return self._tokenizer.backend_tokenizer

    def decode(self, token_ids: list[int], **options: Any) -> str:
        if self._bad in token_ids:
            raise FAULT
        return self._tokenizer.decode(token_ids, **options)


def test_a_text_that_cannot_be_decoded(world: World) -> None:
    """Also when it is decoded once more to return what was held back."""
    culprit = ask("bad", prompt=prompt(12, 3))
    alone, _ = tiny.make_engine(world.injection, {})
    own = set(run(alone, [culprit])["bad", 0].tokens)
    bad = min(own - tokens_of_neighbours(world))

    def spoil(engine: Engine) -> None:
        tokenizer: Any = _Tokenizer(engine.tokenizer, bad)
        engine.tokenizer = tokenizer

    check(world, culprit, spoil)


def test_an_adapter_that_cannot_be_taken_into_use(world: World) -> None:
    def spoil(engine: Engine) -> None:
        acquire = engine.pool.acquire

        def failing(selection: AdapterSelection) -> bool:
            if selection.task_digest == "task-2":
                raise FAULT
            return acquire(selection)

        engine.pool.acquire = failing

    check(world, ask("bad", AdapterSelection("task-2")), spoil)


@pytest.mark.parametrize("method", ["find_cached", "share", "allocate"])
def test_a_sequence_that_cannot_be_planned(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """While it waits, once its adapters are in use, and while it runs."""
    plain = getattr(BlockTables, method)

    def failing(tables: BlockTables, sequence: Sequence, *args: Any) -> Any:
        has_begun = method != "allocate" or sequence.num_output_tokens
        if sequence.request.id == "bad" and has_begun:
            raise FAULT
        return plain(tables, sequence, *args)

    monkeypatch.setattr(BlockTables, method, failing)
    check(world, ask("bad", AdapterSelection("task-1", "crma-1")), lambda _: None)


def test_a_request_that_cannot_begin(world: World) -> None:
    options: dict[str, Any] = {"seed": 2**70}
    check(world, ask("bad", **options), lambda _: None)


INTEGERS = [10**309, -(10**309), 2**63, -(2**63), 2**64, -1, 0, 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 1e-320, 1e308, -1e308, 0.5]
INTEGER_FIELDS = ["top_k", "min_tokens", "seed", "logprobs", "prompt_logprobs"]
INTEGER_FIELDS += ["prompt_logprobs_from"]
FLOAT_FIELDS = ["temperature", "top_p", "min_p"]
FLOAT_FIELDS += ["repetition_penalty", "presence_penalty", "frequency_penalty"]
integers = st.sampled_from(INTEGERS)
numbers = st.sampled_from(INTEGERS + FLOATS)
fields_of_integers = st.dictionaries(st.sampled_from(INTEGER_FIELDS), integers, max_size=3)
fields_of_floats = st.dictionaries(st.sampled_from(FLOAT_FIELDS), numbers, max_size=3)
biases = st.lists(st.tuples(st.sampled_from([0, 7, 2**63]), numbers), max_size=2)


@settings(derandomize=True, deadline=None, max_examples=60, phases=[Phase.generate])
@given(fields_of_integers, fields_of_floats, biases, integers)
def test_no_number_in_a_request_harms_another(
    whole: dict[str, Any], real: dict[str, Any], bias: list[tuple[int, float]], stop_token: int
) -> None:
    """`top_k: 10**309` once ended the server. The edge refuses most of these.

    Whether the request itself fails is left open.
    """
    engine, _ = tiny.make_engine(tiny.injection(), {}, max_num_seqs=8, num_blocks=200)
    options = {"temperature": 1.0, "seed": 3, **whole, **real}
    options |= {"logit_bias": tuple(bias), "stop_token_ids": (stop_token,)}
    calls = [NEIGHBOURS[0], NEIGHBOURS[4]]
    requests = [BASE_WORLD.request(str(i), call) for i, call in enumerate(calls)]
    answers = run(engine, [requests[0], ask("bad", **options), requests[1]])
    assert answers["bad", 0].reason is not None
    for number, call in enumerate(calls):
        assert not mismatches(BASE_WORLD, answers[str(number), 0], call, 0, 1e-4)


def broken_engine() -> tuple[Engine, Callable[[], None]]:
    """An engine whose forward pass raises, and what mends it."""
    engine, _ = tiny.make_engine(tiny.injection(), {}, max_num_seqs=8)
    forward = engine.runner.run

    def run_none(*_: Any) -> Any:
        raise FAULT

    def mend() -> None:
        engine.runner.run = forward

    engine.runner.run = run_none
    return engine, mend


def fail(engine: Engine, name: str) -> FinishReason | None:
    """Run a request in one step."""
    engine.add(ask(name))
    return engine.step()[-1].finish_reason


def test_three_steps_in_a_row_in_which_nothing_can_be_computed_end_the_engine() -> None:
    engine, _ = broken_engine()
    assert [fail(engine, str(i)) for i in range(2)] == [FinishReason.ERROR] * 2
    engine.add(ask("third"))
    with pytest.raises(EngineFailed, match="3 steps in a row failed, the last one with: injected"):
        engine.step()


def test_a_step_that_computes_something_starts_the_count_anew() -> None:
    engine, mend = broken_engine()
    broken = engine.runner.run
    for _ in range(3):
        assert [fail(engine, str(i)) for i in range(2)] == [FinishReason.ERROR] * 2
        mend()
        assert run(engine, [ask()])["r", 0].reason is FinishReason.LENGTH
        engine.runner.run = broken


def test_requests_that_fail_one_after_the_other_by_their_own_fault_end_nothing() -> None:
    """Else three bad requests to an idle server would end it."""
    engine, _ = tiny.make_engine(tiny.injection(), {})
    forward = engine.runner.run

    def run_good(batch: Any, new_blocks: list[int]) -> Any:
        if any(chunk.sequence.request.id == "bad" for chunk in batch.chunks):
            raise FAULT
        return forward(batch, new_blocks)

    engine.runner.run = run_good
    assert [fail(engine, "bad") for _ in range(9)] == [FinishReason.ERROR] * 9
    engine.check_integrity()
    assert run(engine, [ask()])["r", 0].reason is FinishReason.LENGTH


def test_requests_that_cannot_be_planned_one_after_the_other_end_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = tiny.make_engine(tiny.injection(), {})
    plain = BlockTables.find_cached

    def failing(tables: BlockTables, sequence: Sequence) -> list[int]:
        if sequence.request.id == "bad":
            raise FAULT
        return plain(tables, sequence)

    monkeypatch.setattr(BlockTables, "find_cached", failing)
    assert [fail(engine, "bad") for _ in range(9)] == [FinishReason.ERROR] * 9
    assert run(engine, [ask()])["r", 0].reason is FinishReason.LENGTH


def test_three_steps_in_a_row_in_which_nothing_can_be_planned_end_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def allocate(*_: Any) -> Any:
        raise FAULT

    engine, _ = tiny.make_engine(tiny.injection(), {})
    monkeypatch.setattr(engine.scheduler.blocks, "allocate", allocate)
    assert [fail(engine, str(i)) for i in range(2)] == [FinishReason.ERROR] * 2
    engine.add(ask("third"))
    with pytest.raises(EngineFailed, match="the last one with: injected"):
        engine.step()


def test_a_fault_outside_of_the_computation_ends_those_that_run_and_no_others() -> None:
    """And it is tried again: a request that waits is served by the next step."""
    engine, _ = tiny.make_engine(tiny.injection(), {}, max_num_seqs=1)
    for name in ("runs", "waits"):
        engine.add(ask(name))
    outputs = engine.step()
    schedule = engine.scheduler.schedule
    faults = [FAULT] * 2

    def fail_first(*args: Any) -> Any:
        if faults:
            raise faults.pop()
        return schedule(*args)

    engine.scheduler.schedule = fail_first
    while engine.scheduler.unfinished():
        outputs += engine.step()
        assert not engine.is_idle
        engine.check_integrity()
    ends = {o.request_id: o.finish_reason for o in outputs if o.finish_reason is not None}
    assert ends == {"runs": FinishReason.ERROR, "waits": FinishReason.LENGTH}


def test_a_step_of_n_sequences_is_tried_at_most_twice_n_times() -> None:
    """A fault that is not one sequence's ends those of the step; later ones are served."""
    engine, _ = tiny.make_engine(tiny.injection(), {}, max_num_seqs=8)
    forward = engine.runner.run
    num_runs = 0

    def run_none(*_: Any) -> Any:
        nonlocal num_runs
        num_runs += 1
        raise FAULT

    engine.runner.run = run_none
    answers = run(engine, [ask(str(i)) for i in range(8)])
    assert {answer.reason for answer in answers.values()} == {FinishReason.ERROR}
    assert num_runs == 15 + 1, "and one that tells whether the model can compute at all"
    engine.runner.run = forward
    assert run(engine, [ask()])["r", 0].reason is FinishReason.LENGTH


def test_a_fault_that_passes_ends_nothing() -> None:
    engine, _ = tiny.make_engine(tiny.injection(), {})
    forward = engine.runner.run
    faults = [FAULT]

    def run_later(*step: Any) -> Any:
        if faults:
            raise faults.pop()
        return forward(*step)

    engine.runner.run = run_later
    answers = run(engine, [ask("a", prompt=PROMPT), ask("b", prompt=prompt(20))])
    assert {answer.reason for answer in answers.values()} == {FinishReason.LENGTH}
