"""server.ray.call: what crosses between processes."""

import pickle
import time
from dataclasses import replace

from tiny import adapters, ask, injection

from crma.core.selection import AdapterSelection
from server.engine.request import FinishReason, RequestOutput, TokenLogprob
from server.ray.call import Call, joined


def test_times_are_told_by_the_clock_of_who_receives_them() -> None:
    now = time.monotonic()
    call = Call.of(replace(ask(), arrival=now - 3, deadline=now + 7), {})
    received = pickle.loads(pickle.dumps(call)).received()
    assert call.age_s >= 3
    assert call.left_s is not None
    assert call.left_s <= 7
    assert abs(received.arrival - (time.monotonic() - call.age_s)) < 1
    assert abs(received.deadline - (time.monotonic() + call.left_s)) < 1


def test_a_request_without_deadline_has_none_elsewhere() -> None:
    assert Call.of(ask(), {}).received().deadline is None


def test_a_call_names_the_adapters_that_it_needs() -> None:
    assert Call.of(ask(), {}).adapters == frozenset()
    both = AdapterSelection("task", "backbone")
    assert Call.of(ask("both", both), {}).adapters == {"task", "backbone"}


def test_the_outputs_of_each_sequence_become_one() -> None:
    outputs = [
        RequestOutput("r", 0, (1,), "one ", (TokenLogprob(-1.0),), (TokenLogprob(-9.0),)),
        RequestOutput("r", 1, (7,), "seven"),
        RequestOutput("r", 0, (2, 3), "two", (TokenLogprob(-2.0), TokenLogprob(-3.0))),
        RequestOutput("r", 1, finish_reason=FinishReason.STOP, completion_tokens=1),
        RequestOutput("r", 0, finish_reason=FinishReason.LENGTH, completion_tokens=3),
    ]
    first, second = joined(outputs)
    assert (first.index, first.token_ids, first.text) == (0, (1, 2, 3), "one two")
    assert [each.logprob for each in first.logprobs] == [-1.0, -2.0, -3.0]
    assert [each.logprob for each in first.prompt_logprobs] == [-9.0]
    assert (first.finish_reason, first.completion_tokens) == (FinishReason.LENGTH, 3)
    assert (second.index, second.text, second.finish_reason) == (1, "seven", FinishReason.STOP)


def test_adapters_cross_as_they_are() -> None:
    for adapter in adapters(injection()).values():
        received = pickle.loads(pickle.dumps(adapter))
        assert type(received) is type(adapter)
        assert _bits(received) == _bits(adapter)


def _bits(adapter: object) -> list[bytes]:
    """The tensors of a LoRA or a backbone, as they are in memory."""
    from torch import Tensor

    found: list[bytes] = []

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            found.append(value.detach().numpy().tobytes())
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, list | tuple):
            for each in value:
                visit(each)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(adapter)
    assert found
    return found
