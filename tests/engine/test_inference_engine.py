"""server.engine.inference_engine: how every implementation must behave."""

import asyncio
import json
import time
from typing import Any

import pytest
from tiny import ask

from crma.core.errors import NotFound, StoreError
from crma.core.selection import BASE, AdapterSelection
from crma.method.backbone import Backbone
from crma.method.lora import Lora
from server.engine.errors import (
    AdapterInUse,
    EngineStopped,
    InvalidConstraint,
    PromptTooLong,
    QueueFull,
)
from server.engine.inference_engine import InferenceEngine, Outputs
from server.engine.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    RequestOutput,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")  # vLLM stays on the loop that it began on
TASK = AdapterSelection("task-0")
BOTH = AdapterSelection("task-1", "crma-0")
BROKEN = AdapterSelection("broken")
END = 1  # the tiny tokenizer's
LONG = 300  # tokens: enough for a request to be still running when a test acts on it

Received = list[RequestOutput]


async def read(stream: Outputs) -> Received:
    return [output async for output in stream]


async def run(engine: InferenceEngine, request: Request) -> Received:
    return await asyncio.wait_for(read(engine.submit(request)), 30)


def choose(*texts: str) -> Constraint:
    return Constraint(ConstraintKind.CHOICE, json.dumps(texts))


def text_of(outputs: Received, index: int = 0) -> str:
    return "".join(output.text for output in outputs if output.index == index)


def tokens_of(outputs: Received, index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


def logprobs_of(outputs: Received) -> list[float]:
    return [each.logprob for output in outputs for each in output.logprobs]


def prompt_logprobs_of(outputs: Received) -> list[float]:
    return [each.logprob for output in outputs for each in output.prompt_logprobs]


def ending(outputs: Received) -> tuple[FinishReason | None, str | None]:
    return outputs[-1].finish_reason, outputs[-1].error


async def begin(engine: InferenceEngine, request: Request) -> tuple[Outputs, RequestOutput]:
    """Submit a request and wait for its first output; returns the stream and that output."""
    stream = engine.submit(request)
    return stream, await asyncio.wait_for(anext(stream), 30)


async def is_well(engine: InferenceEngine) -> None:
    """Check that a later request is answered in full."""
    outputs = await run(engine, ask("later", BOTH))
    assert ending(outputs) == (FinishReason.LENGTH, None)
    assert len(tokens_of(outputs)) == 6


# Answers ----------------------------------------------------------------------------------------


async def test_a_batch_gives_every_request_what_it_gets_alone(engine: InferenceEngine) -> None:
    selections = (BASE, TASK, BOTH, AdapterSelection(None, "crma-1"))
    sampled = {"temperature": 1.2, "seed": 4}
    requests = []
    for index, selection in enumerate(selections):
        requests.append(ask(f"greedy-{index}", selection, logprobs=0, max_tokens=4 + index))
        requests.append(ask(f"sampled-{index}", selection, logprobs=0, **sampled))
    alone = [await run(engine, request) for request in requests]
    together = await asyncio.gather(*(run(engine, request) for request in requests))
    for single, batched in zip(alone, together, strict=True):
        assert tokens_of(batched) == tokens_of(single)
        assert text_of(batched) == text_of(single)
        assert ending(batched) == ending(single) == (FinishReason.LENGTH, None)
        assert logprobs_of(batched) == pytest.approx(logprobs_of(single), abs=1e-4)
    greedy_texts = {text_of(outputs) for outputs in alone[::2]}
    assert len(greedy_texts) == len(selections)


async def test_constrained_and_free_requests_in_a_batch_get_what_they_get_alone(
    engine: InferenceEngine,
) -> None:
    choice = choose("the café", "free", "日本 and 🙂")
    await engine.check(choice)
    constrained = {"constraint": choice, "max_tokens": 40, "stop_token_ids": (END,)}
    sampled = {"temperature": 1.2, "seed": 4}
    requests = [
        ask("free-0", TASK),
        ask("greedy", TASK, **constrained),
        ask("free-1", BOTH, **sampled),
        ask("sampled", BOTH, **constrained, **sampled),
    ]
    alone = [await run(engine, request) for request in requests]
    together = await asyncio.gather(*(run(engine, request) for request in requests))
    for single, batched in zip(alone, together, strict=True):
        assert tokens_of(batched) == tokens_of(single)
        assert text_of(batched) == text_of(single)
        assert ending(batched) == ending(single)


async def test_an_answer_under_a_choice_is_one_of_its_texts(engine: InferenceEngine) -> None:
    labels = ("the café", "free", "日本 and 🙂", 'quoted "the"\n')
    choice = choose(*labels)
    await engine.check(choice)
    constrained = {"constraint": choice, "max_tokens": 60, "stop_token_ids": (END,)}
    outputs = await run(engine, ask("r", n=4, temperature=2.0, seed=0, **constrained))
    texts = [text_of(outputs, index) for index in range(4)]
    assert set(texts) <= set(labels)
    assert len(set(texts)) > 1
    assert {output.finish_reason for output in outputs} <= {None, FinishReason.STOP}


async def test_a_constraint_that_is_none_is_refused_before_anything_is_queued(
    engine: InferenceEngine,
) -> None:
    for kind, source in ((ConstraintKind.REGEX, "(a|b"), (ConstraintKind.JSON_SCHEMA, "false")):
        with pytest.raises(InvalidConstraint, match=r"^here: ") as caught:
            await engine.check(Constraint(kind, source, field="here"))
        assert caught.value.field == "here"
    await is_well(engine)


async def test_sequence_i_of_n_draws_as_a_request_with_seed_plus_i_does(
    engine: InferenceEngine,
) -> None:
    sampled: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
    pair = await run(engine, ask("pair", TASK, seed=5, n=2, **sampled))
    for index in range(2):
        single = await run(engine, ask(f"single-{index}", TASK, seed=5 + index, **sampled))
        assert tokens_of(single) == tokens_of(pair, index)
        assert text_of(single) == text_of(pair, index)
    assert text_of(pair, 0) != text_of(pair, 1)


async def test_a_stream_has_the_text_in_parts_and_the_totals_at_the_end(
    engine: InferenceEngine,
) -> None:
    outputs = await run(engine, ask(max_tokens=12, logprobs=2))
    assert len(outputs) > 2
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    last = outputs[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.completion_tokens == len(tokens_of(outputs)) == 12
    assert last.timings is not None
    assert last.timings.ttft_s is not None
    assert last.timings.queue_s <= last.timings.ttft_s <= last.timings.e2e_s
    assert [len(each.top) for output in outputs for each in output.logprobs] == [2] * 12


async def test_the_text_ends_before_a_stop_string(engine: InferenceEngine) -> None:
    whole = text_of(await run(engine, ask("whole", max_tokens=12)))
    stop = whole[5:8]
    stopped = await run(engine, ask("stopped", max_tokens=12, stop=(stop,)))
    assert text_of(stopped) == whole.partition(stop)[0]
    assert ending(stopped) == (FinishReason.STOP, None)


async def test_a_stop_string_is_part_of_the_text_if_asked_for(engine: InferenceEngine) -> None:
    whole = text_of(await run(engine, ask("whole", max_tokens=12)))
    stop = whole[5:8]
    options = {"stop": (stop,), "include_stop_str_in_output": True}
    stopped = await run(engine, ask("stopped", max_tokens=12, **options))
    assert text_of(stopped) == whole.partition(stop)[0] + stop


async def test_a_stop_token_ends_an_answer_and_is_part_of_it_only_if_asked_for(
    engine: InferenceEngine,
) -> None:
    whole = tokens_of(await run(engine, ask("whole", max_tokens=12)))
    stop = whole[4]
    first = whole.index(stop)
    for is_included in (False, True):
        options = {"stop_token_ids": (stop,), "include_stop_str_in_output": is_included}
        name = f"included-{is_included}"
        stopped = await run(engine, ask(name, max_tokens=12, ignore_eos=True, **options))
        assert tokens_of(stopped) == whole[: first + is_included]
        assert ending(stopped) == (FinishReason.STOP, None)


async def test_nothing_ends_an_answer_before_it_has_min_tokens(engine: InferenceEngine) -> None:
    outputs = await run(engine, ask("whole", max_tokens=12))
    stop = tokens_of(outputs)[2]
    options = {"stop_token_ids": (stop,), "min_tokens": 5}
    stopped = tokens_of(await run(engine, ask("by token", max_tokens=12, **options)))
    assert stop not in stopped
    assert len(stopped) >= 5
    text = text_of(outputs)
    options = {"stop": (text[1:3],), "min_tokens": 12}
    assert text_of(await run(engine, ask("by text", max_tokens=12, **options))) == text


async def test_a_bias_can_choose_the_tokens(engine: InferenceEngine) -> None:
    biased = await run(engine, ask("biased", logit_bias=((7, 100.0), (8, -100.0))))
    assert tokens_of(biased) == [7] * 6


async def test_without_tokens_to_generate_the_prompt_is_measured(engine: InferenceEngine) -> None:
    longer = await run(engine, ask("longer", prompt_logprobs=1))
    outputs = await run(engine, ask("none", max_tokens=0, prompt_logprobs=1, n=2))
    assert tokens_of(outputs) == []
    reasons = [output.finish_reason for output in outputs if output.finish_reason]
    assert reasons == [FinishReason.LENGTH] * 2
    measured = prompt_logprobs_of(outputs)
    assert len(measured) == 2
    assert measured == pytest.approx(prompt_logprobs_of(longer), abs=1e-4)
    full = ask("full", prompt=(5,) * 400, max_tokens=0)
    assert ending(await run(engine, full)) == (FinishReason.LENGTH, None)


async def test_warming_up_runs_a_step(engine: InferenceEngine) -> None:
    await engine.warm_up()
    assert engine.stats().num_steps > 0
    await is_well(engine)


# Requests that do not finish --------------------------------------------------------------------


async def test_an_aborted_request_ends_and_its_neighbour_continues(engine: InferenceEngine) -> None:
    neighbour = asyncio.create_task(run(engine, ask("neighbour", BOTH)))
    stream, _ = await begin(engine, ask("aborted", TASK, max_tokens=LONG))
    engine.abort("aborted")
    engine.abort("unknown")
    assert ending(await read(stream)) == (FinishReason.ABORT, None)
    assert ending(await neighbour) == (FinishReason.LENGTH, None)
    await engine.unload("task-0", wait_s=10)
    await is_well(engine)


async def test_closing_a_stream_aborts_its_request(engine: InferenceEngine) -> None:
    stream, _ = await begin(engine, ask("left", TASK, max_tokens=LONG))
    await stream.aclose()
    await engine.unload("task-0", wait_s=10)
    assert "task-0" not in engine.resident()
    await is_well(engine)


async def test_a_deadline_ends_its_own_request_only(engine: InferenceEngine) -> None:
    late = ask("late", TASK, deadline=time.monotonic(), max_tokens=LONG)
    in_time = ask("in time", BOTH, deadline=time.monotonic() + 1000)
    outputs = await asyncio.gather(run(engine, late), run(engine, in_time))
    ends = [ending(each) for each in outputs]
    assert ends == [(FinishReason.ABORT, "deadline"), (FinishReason.LENGTH, None)]
    await is_well(engine)


async def test_an_adapter_that_cannot_be_loaded_fails_its_own_request_only(
    engine: InferenceEngine, known: dict[str, Lora | Backbone]
) -> None:
    def damaged() -> Any:
        raise StoreError("the file is damaged", field="weights")

    engine.register("broken", damaged, 1000)
    neighbour = asyncio.create_task(run(engine, ask("neighbour", BOTH)))
    with pytest.raises(StoreError, match="damaged"):
        await run(engine, ask("unlucky", BROKEN))
    with pytest.raises(NotFound):
        await run(engine, ask("unknown", AdapterSelection("nowhere")))
    assert ending(await neighbour) == (FinishReason.LENGTH, None)
    repaired = known["task-2"]
    engine.register("broken", lambda: repaired, 1000)
    assert ending(await run(engine, ask("again", BROKEN))) == (FinishReason.LENGTH, None)
    await is_well(engine)


async def test_a_request_that_cannot_run_is_refused_at_once(engine: InferenceEngine) -> None:
    too_long = (5,) * 1000
    empty = ()
    for prompt in (empty, too_long):
        with pytest.raises(PromptTooLong):
            engine.submit(ask("long", prompt=prompt))
    flood = [ask(f"flood-{index}", max_tokens=LONG) for index in range(1000)]

    def submit_all() -> None:
        for request in flood:
            engine.submit(request)

    with pytest.raises(QueueFull) as caught:
        submit_all()
    assert caught.value.retry_after >= 1
    for request in flood:
        engine.abort(request.id)


async def test_closing_ends_running_requests_and_refuses_new_ones(engine: InferenceEngine) -> None:
    stream, _ = await begin(engine, ask("running", TASK, max_tokens=LONG))
    rest, _ = await asyncio.gather(read(stream), engine.close())
    assert ending(rest) == (FinishReason.ABORT, None)
    with pytest.raises(EngineStopped):
        engine.submit(ask("late"))


# Adapters ---------------------------------------------------------------------------------------


async def test_an_adapter_is_resident_from_load_to_unload(engine: InferenceEngine) -> None:
    assert engine.resident() == ()
    await engine.load("task-0")
    await engine.load("crma-0")
    assert set(engine.resident()) == {"task-0", "crma-0"}
    await engine.unload("task-0")
    await engine.unload("task-0")  # no longer resident: nothing happens
    assert engine.resident() == ("crma-0",)
    with pytest.raises(NotFound):
        await engine.load("nowhere")
    outputs = await run(engine, ask("loads it again", TASK))
    assert ending(outputs) == (FinishReason.LENGTH, None)
    assert "task-0" in engine.resident()


async def test_an_adapter_in_use_is_unloaded_when_its_requests_have_ended(
    engine: InferenceEngine,
) -> None:
    stream, _ = await begin(engine, ask("uses it", TASK, max_tokens=LONG))
    with pytest.raises(AdapterInUse):
        await engine.unload("task-0")
    rest, _ = await asyncio.gather(read(stream), engine.unload("task-0", wait_s=30))
    assert ending(rest) == (FinishReason.LENGTH, None)
    assert "task-0" not in engine.resident()


async def test_unloading_can_cancel_the_requests_that_use_the_adapter(
    engine: InferenceEngine,
) -> None:
    stream, _ = await begin(engine, ask("uses it", TASK, max_tokens=LONG))
    other = asyncio.create_task(run(engine, ask("other", BOTH)))
    rest, _ = await asyncio.gather(read(stream), engine.unload("task-0", wait_s=30, cancel=True))
    assert ending(rest) == (FinishReason.ABORT, "unloaded")
    assert ending(await other) == (FinishReason.LENGTH, None)
    assert "task-0" not in engine.resident()


async def test_a_pinned_adapter_stays_until_it_is_unpinned(engine: InferenceEngine) -> None:
    await engine.pin("task-0")
    await engine.pin("task-0")
    stream, _ = await begin(engine, ask("uses it", TASK))
    with pytest.raises(AdapterInUse):
        await engine.unload("task-0", cancel=True)
    assert ending(await read(stream)) == (FinishReason.LENGTH, None), "a pin protects its users"
    assert "task-0" in engine.resident()
    engine.unpin("task-0")
    await engine.unload("task-0")
    assert "task-0" not in engine.resident()
