"""server.engine.vllm.answer"""

from types import SimpleNamespace
from typing import Any

import tiny

from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from server.engine.vllm.answer import Answer

END = 1


def output(
    *tokens: int,
    reason: str | None = None,
    logprobs: list[dict[int, Any]] | None = None,
    prompt_logprobs: list[dict[int, Any] | None] | None = None,
) -> Any:
    """What vLLM says after a step."""
    completion = SimpleNamespace(token_ids=tokens, finish_reason=reason, logprobs=logprobs)
    return SimpleNamespace(
        outputs=[completion], metrics=None, num_cached_tokens=3, prompt_logprobs=prompt_logprobs
    )


def answer(**options: Any) -> Answer:
    request = Request("r", (5, 9, 40), stop_token_ids=(END,), sampling=SamplingParams(**options))
    return Answer(request, 0, tiny.tokenizer(), frozenset())


def logprob(value: float, rank: int) -> Any:
    return SimpleNamespace(logprob=value, rank=rank)


def text_of(*outputs: RequestOutput) -> str:
    return "".join(each.text for each in outputs)


def decoded(*tokens: int) -> str:
    return tiny.tokenizer().decode(list(tokens))


def test_the_end_token_is_no_part_of_an_answer_unless_asked_for() -> None:
    for is_asked in (False, True):
        made = answer(include_stop_str_in_output=is_asked)
        first, last = made.take(output(40, 41)), made.take(output(END, reason="stop"))
        assert first.finish_reason is None
        assert last.finish_reason is FinishReason.STOP
        assert last.token_ids == ((END,) if is_asked else ())
        assert last.completion_tokens == 2 + is_asked
        assert last.cached_tokens == 3
        assert text_of(first, last) == decoded(40, 41)
        assert made.is_finished


def test_a_stop_string_ends_an_answer_within_the_tokens_of_a_step() -> None:
    whole = decoded(40, 41, 42, 43)
    made = answer(stop=(whole[1:3],), logprobs=0)
    positions = [{token: logprob(-1.0, 1)} for token in (40, 41, 42, 43)]
    last = made.take(output(40, 41, 42, 43, logprobs=positions))
    assert last.finish_reason is FinishReason.STOP
    assert last.text == whole[:1]
    assert last.token_ids == (40, 41, 42)
    assert len(last.logprobs) == 3


def test_log_probabilities_are_of_the_token_and_of_the_likeliest_by_rank() -> None:
    made = answer(logprobs=2, prompt_logprobs=1, prompt_logprobs_from=2)
    position = {40: logprob(-3.0, 7), 50: logprob(-1.0, 2), 51: logprob(-0.5, 1)}
    prompt = [None, {9: logprob(-2.0, 1)}, {40: logprob(-4.0, 3), 6: logprob(-0.1, 1)}]
    found = made.take(output(40, logprobs=[position], prompt_logprobs=prompt))
    (token,) = found.logprobs
    assert token.logprob == -3.0
    assert token.top == ((51, -0.5), (50, -1.0))
    (measured,) = found.prompt_logprobs
    assert measured.logprob == -4.0
    assert measured.top == ((6, -0.1),)


def test_a_request_for_no_tokens_ends_with_the_first_step_and_without_its_token() -> None:
    last = answer(max_tokens=0).take(output(40, reason="length"))
    assert (last.token_ids, last.text, last.completion_tokens) == ((), "", 0)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.timings is not None
    assert last.timings.ttft_s is None


def test_an_answer_that_is_cut_short_has_its_totals() -> None:
    made = answer()
    made.take(output(40, 41))
    last = made.end(FinishReason.ABORT, "deadline")
    assert (last.finish_reason, last.error) == (FinishReason.ABORT, "deadline")
    assert last.completion_tokens == 2


def test_an_answer_that_vllm_ends_for_another_reason_is_an_error_with_a_message() -> None:
    last = answer().take(output(reason="error"))
    assert last.finish_reason is FinishReason.ERROR
    assert last.error
