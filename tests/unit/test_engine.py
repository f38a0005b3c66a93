"""server.engine.engine: how a sequence begins, ends and fails. That its tokens are right is in tests/numerics."""

from __future__ import annotations

from typing import Any

import tiny

from crma.generate import generate
from server.engine.engine import Engine, model_stop_ids
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams, Timings

PROMPT = (5, 9, 40)


def make(**limits: int) -> Engine:
    return tiny.make_engine(tiny.injection(), {}, **limits)[0]


def ask(name: str = "r", **sampling: Any) -> Request:
    return Request(name, PROMPT, (), SamplingParams(**{"max_tokens": 6, **sampling}), arrival=1.0)


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


def oracle() -> tuple[int, ...]:
    return generate(tiny.injection(), PROMPT, max_tokens=6).token_ids


def test_an_end_token_of_the_model_ends_it_unless_it_is_to_go_on() -> None:
    engine = make()
    engine.stop_ids = frozenset([oracle()[2]])
    for ignore_eos, reason, tokens in ((False, FinishReason.STOP, 2), (True, FinishReason.LENGTH, 6)):
        outputs = run(engine, ask(ignore_eos=ignore_eos))
        assert (last(outputs).finish_reason, sum((o.token_ids for o in outputs), ())) == (reason, oracle()[:tokens])
        assert not any(o.logprobs for o in outputs), "they were not asked for"


def test_a_stop_string_ends_it_and_is_no_part_of_the_text() -> None:
    text = tiny.tokenizer().decode(oracle())
    stop = text[2:4]
    outputs = run(make(), ask(stop=(stop,)))
    assert "".join(o.text for o in outputs) == text[: text.index(stop)]
    assert (last(outputs).finish_reason, last(outputs).completion_tokens < 6) == (FinishReason.STOP, True)


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
        assert last(outputs, name).timings == Timings(*expected)
    counters = engine.counters
    assert (counters.num_steps, counters.prompt_tokens, counters.generation_tokens) == (4, 6, 4)


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


def test_the_models_end_tokens_are_those_of_both_its_files() -> None:
    assert [model_stop_ids(tiny.tokenizer(), eos) for eos in (None, 7, [7, 8])] == [{1}, {1, 7}, {1, 7, 8}]
