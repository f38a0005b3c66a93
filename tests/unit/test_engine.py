"""server.engine.engine: how a sequence begins, ends and fails. That its tokens are right is in tests/numerics."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from crma.generate import generate
from server.engine.engine import Engine, model_stop_ids
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams

PROMPT = (5, 9, 40)


def make(**limits: int) -> Engine:
    return tiny.make_engine(tiny.injection(), {}, **limits)[0]


def ask(name: str = "r", stop_ids: tuple[int, ...] = (), deadline: float | None = None, **sampling: Any) -> Request:
    return Request(
        name, PROMPT, stop_ids, SamplingParams(**{"max_tokens": 6, **sampling}), arrival=1.0, deadline=deadline
    )


def run(engine: Engine, *requests: Request) -> list[RequestOutput]:
    for request in requests:
        engine.add(request)
    outputs = []
    while engine.scheduler.has_work():
        outputs += engine.step()
        engine.check_integrity()
    return outputs


def last(outputs: list[RequestOutput], name: str = "r") -> RequestOutput:
    (found,) = [o for o in outputs if o.finish_reason is not None and o.request_id == name]
    return found


def oracle(**options: Any) -> tuple[int, ...]:
    return generate(tiny.injection(), PROMPT, **{"max_tokens": 6, **options}).token_ids


def test_an_end_token_ends_it_unless_it_is_to_go_on() -> None:
    third = oracle()[2]
    for engine, stop_ids in ((make(), (third,)), (make(), ())):
        if not stop_ids:
            engine.stop_ids = frozenset([third])
        ended = run(engine, ask(stop_ids=stop_ids))
        assert (last(ended).finish_reason, last(ended).completion_tokens) == (FinishReason.STOP, 2)
        assert sum((o.token_ids for o in ended), ()) == oracle()[:2], "the end token is no part of the answer"
        went_on = run(engine, ask(stop_ids=stop_ids, ignore_eos=True))
        assert (last(went_on).finish_reason, last(went_on).completion_tokens) == (FinishReason.LENGTH, 6)


def test_a_stop_string_ends_it_and_is_no_part_of_the_text() -> None:
    text = tiny.tokenizer().decode(oracle())
    stop = text[2:4]
    outputs = run(make(), ask(stop=(stop,)))
    assert "".join(o.text for o in outputs) == text[: text.index(stop)]
    assert last(outputs).finish_reason is FinishReason.STOP
    assert last(outputs).completion_tokens < 6


def test_sequence_i_of_n_draws_from_seed_plus_i_and_only_asked_log_probabilities_come() -> None:
    sampled = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    outputs = run(make(), ask(n=3, seed=5, **sampled))
    for index in range(3):
        mine = sum((o.token_ids for o in outputs if o.index == index), ())
        assert mine == oracle(seed=5 + index, **sampled)
    assert not any(o.logprobs for o in outputs)


def test_unseeded_sequences_are_not_one_sequence() -> None:
    outputs = run(make(max_num_seqs=8), ask(n=8, temperature=2.0))
    assert len({sum((o.token_ids for o in outputs if o.index == i), ()) for i in range(8)}) > 1


def test_times_are_seconds_from_arrival_and_counters_count() -> None:
    engine = make(max_num_seqs=1)
    now = [1.0]
    engine.clock = lambda: now[0]
    for name in ("first", "second"):
        engine.add(ask(name, max_tokens=2))
    outputs = []
    while engine.scheduler.has_work():
        now[0] += 1
        outputs += engine.step()
    for name, expected in (("first", (1, 1, 2)), ("second", (3, 3, 4))):
        times = last(outputs, name).timings
        assert times is not None
        assert (times.queue_s, times.ttft_s, times.e2e_s) == expected
    counters = engine.counters
    assert (counters.num_steps, counters.prompt_tokens, counters.generation_tokens) == (4, 6, 4)


@pytest.mark.parametrize("name", ["running", "waiting"])
def test_a_deadline_ends_its_own_request_wherever_it_is(name: str) -> None:
    engine = make(max_num_seqs=1)
    now = [0.0]
    engine.clock = lambda: now[0]
    for each in ("running", "waiting"):
        engine.add(ask(each, deadline=5.0 if each == name else None))
    first = engine.step()
    now[0] = 5.0
    outputs = first + run(engine)
    assert (last(outputs, name).finish_reason, last(outputs, name).error) == (FinishReason.ABORT, "deadline")
    other = "waiting" if name == "running" else "running"
    assert (last(outputs, other).finish_reason, last(outputs, other).completion_tokens) == (FinishReason.LENGTH, 6)
    assert (last(outputs, name).timings.ttft_s is None) == (name == "waiting")


def test_a_failing_forward_pass_ends_what_was_in_it_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, failing = make(max_num_seqs=2), [True]
    real = engine.runner.run

    def sometimes(batch: Any) -> torch.Tensor:
        if failing and batch.input_ids.shape[1] == 1 and failing.pop():
            raise RuntimeError("out of memory")
        return real(batch)

    monkeypatch.setattr(engine.runner, "run", sometimes)
    outputs = run(engine, ask("a"), ask("b"), ask("c"))
    for name in "ab":
        assert (last(outputs, name).finish_reason, last(outputs, name).error) == (FinishReason.ERROR, "the step failed")
        assert last(outputs, name).completion_tokens == 1
    assert sum((o.token_ids for o in outputs if o.request_id == "c"), ()) == oracle()


def test_an_abort_ends_all_sequences_once_and_gives_what_was_held_back() -> None:
    engine = make(max_num_seqs=1)
    engine.add(ask(n=2, stop=(tiny.tokenizer().decode(oracle()[:2]) + "☃",)))
    assert "".join(o.text for o in engine.step()) == "", "it could still become the stop string"
    ended = engine.abort("r")
    assert [(o.index, o.finish_reason, o.error) for o in ended] == [(i, FinishReason.ABORT, None) for i in (1, 0)]
    assert "".join(o.text for o in ended) == tiny.tokenizer().decode(oracle()[:1])
    assert engine.abort("r") == []
    assert engine.step() == []
    engine.check_integrity()


@pytest.mark.parametrize(("eos", "expected"), [(None, {1}), (7, {1, 7}), ([7, 8], {1, 7, 8})])
def test_the_models_end_tokens_are_those_of_both_its_files(eos: Any, expected: set[int]) -> None:
    assert model_stop_ids(tiny.tokenizer(), eos) == expected
