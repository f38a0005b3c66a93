"""server.engine.native.engine: how a sequence begins, ends and fails.

That its tokens are right is tested in tests/numerics.
"""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from schedules import Loads
from tiny import PROMPT, ask

from crma.core.selection import AdapterSelection
from crma.method.injection import Injection
from crma.models.reference import generate
from server.engine.native.block_pool import NULL_BLOCK
from server.engine.native.engine import MAX_OVERTAKEN, Engine, model_stop_ids
from server.engine.native.step_budget import FEWEST_TOKENS, StepBudget
from server.engine.request import FinishReason, Request, RequestOutput, Timings


def make(**limits: int) -> Engine:
    engine, _ = tiny.make_engine(tiny.injection(), {}, **limits)
    return engine


def run(engine: Engine, *requests: Request) -> list[RequestOutput]:
    for request in requests:
        engine.add(request)
    outputs = []
    while engine.scheduler.unfinished():
        outputs += engine.step()
        engine.check_integrity()
    return outputs


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def last(outputs: list[RequestOutput], name: str = "r") -> RequestOutput:
    ends = [o for o in outputs if o.finish_reason is not None and o.request_id == name]
    assert len(ends) == 1
    return ends[0]


def oracle() -> tuple[int, ...]:
    """The six tokens that `ask()` is answered with."""
    return generate(tiny.injection(), PROMPT, max_tokens=6).token_ids


@pytest.mark.parametrize("native", [True, False])
def test_what_blocks_held_before_reaches_no_answer(native: bool) -> None:
    engine = make(native=native)
    engine.runner.kv[:, NULL_BLOCK + 1 :] = torch.nan
    outputs = run(engine, ask())
    assert tuple(token for output in outputs for token in output.token_ids) == oracle()


@pytest.mark.parametrize("int8", [True, False])
def test_a_step_that_ends_no_prompt_needs_no_logits(int8: bool) -> None:
    """Also where the kernel packs the head, and gets no row of it."""
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    inj = tiny.injection()
    model = tiny.fresh(inj).bfloat16().float()  # weights that lose nothing when they are packed
    engine, _ = tiny.make_engine(Injection(model), {}, max_num_batched_tokens=4, int8=int8)
    at_once, _ = tiny.make_engine(Injection(model), {}, int8=int8)
    outputs = run(engine, ask(prompt=PROMPT * 2))
    assert engine.runner.decoder is not None
    assert engine.runner.decoder.packed_blocks is not None
    assert text_of(outputs) == text_of(run(at_once, ask(prompt=PROMPT * 2)))


def test_an_end_token_of_the_model_ends_a_sequence_unless_it_is_ignored() -> None:
    engine = make()
    engine.stop_ids = frozenset([oracle()[2]])
    cases = [(False, FinishReason.STOP, 2), (True, FinishReason.LENGTH, 6)]
    for ignore_eos, reason, num_tokens in cases:
        outputs = run(engine, ask(ignore_eos=ignore_eos))
        token_ids = [token for output in outputs for token in output.token_ids]
        assert last(outputs).finish_reason == reason
        assert token_ids == list(oracle()[:num_tokens])
        assert not any(o.logprobs for o in outputs), "they were not asked for"


def test_min_tokens_forbids_every_end_token_and_log_probabilities_do_not_show_it() -> None:
    """Though it would have come third, and whether the model or the prompt format names it."""
    end = oracle()[2]
    plain = [p for o in run(make(), ask(logprobs=1)) for p in o.logprobs]
    for name in ("model", "format", "caller"):
        engine = make()
        request = ask(min_tokens=4, logprobs=1)
        if name == "model":
            engine.stop_ids = frozenset([end])
        elif name == "format":
            request = replace(request, stop_token_ids=(end,))
        else:
            request = ask(min_tokens=4, logprobs=1, stop_token_ids=(end,))
        outputs = run(engine, request)
        token_ids = [token for output in outputs for token in output.token_ids]
        logprobs = [p for output in outputs for p in output.logprobs]
        assert token_ids[:2] == list(oracle()[:2])
        assert end not in token_ids[:4]
        assert last(outputs).completion_tokens >= 4
        assert logprobs[2].top == plain[2].top, "they are of the unmodified distribution"


def test_a_row_of_the_model_that_is_no_token_is_never_sampled() -> None:
    """Log-probabilities stay those of the model; such a row is not among the most probable."""
    plain = run(make(), ask(logprobs=0))
    engine = make()
    engine.num_tokens = 100
    greedy = run(engine, ask("greedy", logprobs=5, prompt_logprobs=5))
    engine.stop_ids = frozenset([290])  # no such token either, so that nothing forbids it
    drawn = run(engine, ask("drawn", temperature=50.0, max_tokens=60, min_tokens=60, seed=1))
    tokens = [token for output in [*greedy, *drawn] for token in output.token_ids]
    assert len(tokens) == 66
    assert max(tokens) < 100 <= max(oracle())
    logprobs = [one for output in greedy for one in (*output.logprobs, *output.prompt_logprobs)]
    assert all(token < 100 for one in logprobs for token, _ in one.top)
    # torch's head adds up three rows in another order than one.
    logprob = plain[0].logprobs[0].logprob
    assert greedy[0].logprobs[0].logprob == pytest.approx(logprob, abs=2e-6)


def test_a_stop_string_ends_a_sequence_and_is_no_part_of_its_text() -> None:
    text = tiny.tokenizer().decode(oracle())
    stop = text[2:4]
    outputs = run(make(), ask(stop=(stop,)))
    assert text_of(outputs) == text[: text.index(stop)]
    assert last(outputs).finish_reason == FinishReason.STOP
    assert last(outputs).completion_tokens < 6


def test_an_answer_that_may_fill_the_context_keeps_no_room_that_it_does_not_use() -> None:
    """Chats without max_tokens may: four of them run beside each other in room for one at most."""
    engine = make(max_num_seqs=4, num_blocks=50, block_size=8, max_model_len=400)
    for name in "abcd":
        engine.add(ask(name, max_tokens=397))
    engine.step()
    assert len(engine.scheduler.running) == 4
    for name in "abcd":
        engine.abort(name)


def test_timings_are_seconds_from_arrival_and_counters_count() -> None:
    engine = make(max_num_seqs=1)
    now = 0.0
    engine.clock = lambda: now
    for name in ("first", "second"):
        engine.add(ask(name, max_tokens=2))
    outputs = []
    while engine.scheduler.unfinished():
        now += 1
        outputs += engine.step()
    assert last(outputs, "first").timings == Timings(queue_s=1, ttft_s=1, e2e_s=2)
    assert last(outputs, "second").timings == Timings(queue_s=3, ttft_s=3, e2e_s=4)
    assert engine.counters.num_steps == 4
    assert engine.counters.prompt_tokens == 6
    assert engine.counters.generation_tokens == 4


def test_an_abort_ends_every_sequence_once_and_returns_text_that_was_held_back() -> None:
    engine = make(max_num_seqs=1)
    stop = tiny.tokenizer().decode(oracle()[:2]) + "☃"
    engine.add(ask(n=2, stop=(stop,)))
    assert text_of(engine.step()) == "", "it could still become the stop string"
    ended = engine.abort("r")
    ends = [(output.index, output.finish_reason, output.error) for output in ended]
    assert ends == [(0, FinishReason.ABORT, None), (1, FinishReason.ABORT, None)]
    assert text_of(ended) == tiny.tokenizer().decode(oracle()[:1])
    assert engine.abort("r") == []
    assert engine.step() == []
    engine.check_integrity()


def test_a_sequence_without_room_for_its_adapter_is_overtaken_and_then_comes_next() -> None:
    """Two adapters fit. Two long answers keep them in use, and short ones with them overtake."""
    loads = Loads()
    known = {f"task-{i}": tiny.lora(tiny.injection(), 2, "first", seed=i) for i in range(3)}
    engine, _ = tiny.make_engine(tiny.injection(), known, max_resident=2, executor=loads)

    def add(name: str, task: int, max_tokens: int) -> None:
        engine.add(ask(name, AdapterSelection(f"task-{task}"), max_tokens=max_tokens))

    for task in range(2):
        add(f"long {task}", task, 120)
    for _ in range(3):
        engine.step()
        loads.end_one()
    add("cold", 2, 2)
    for i in range(150):
        add(f"short {i}", i % 2, 2)
    ended: list[str] = []
    while engine.scheduler.unfinished():
        ended += [output.request_id for output in engine.step() if output.finish_reason]
        engine.check_integrity()
        loads.end_one()
    before_cold = ended[: ended.index("cold")]
    overtaking = [name for name in before_cold if name.startswith("short")]
    # Those that ran already when it was held are a few more.
    assert MAX_OVERTAKEN <= len(overtaking) <= MAX_OVERTAKEN + 4
    assert len(ended) == 153


def test_aborting_an_adapter_ends_the_running_sequences_that_use_it_and_no_others() -> None:
    loads = Loads()
    adapters = tiny.adapters(tiny.injection())
    engine, pool = tiny.make_engine(tiny.injection(), adapters, executor=loads)
    for name, task in (("with", "task-0"), ("without", None), ("waits", "task-1")):
        engine.add(ask(name, AdapterSelection(task), max_tokens=50))
    engine.step()
    loads.end_one()
    engine.step()
    ended = [(o.request_id, o.finish_reason, o.error) for o in engine.abort_adapter("task-0")]
    assert ended == [("with", FinishReason.ABORT, "unloaded")]
    pool.unload("task-0")
    assert {s.request.id for s in engine.scheduler.unfinished()} == {"without", "waits"}
    engine.check_integrity()


def test_the_end_tokens_are_the_tokenizers_and_the_generation_configs() -> None:
    tokenizer = tiny.tokenizer()
    assert model_stop_ids(tokenizer, None) == {1}
    assert model_stop_ids(tokenizer, 7) == {1, 7}
    assert model_stop_ids(tokenizer, [7, 8]) == {1, 7, 8}


def test_a_waiting_background_request_takes_no_room_from_an_interactive_ones_adapter() -> None:
    loads = Loads()
    engine, pool = tiny.make_engine(
        tiny.injection(),
        tiny.adapters(tiny.injection()),
        max_num_seqs=2,
        max_resident=2,
        executor=loads,
    )
    for i in range(4):
        engine.add(ask(f"base-{i}"))
    background = ask("background", AdapterSelection("task-0", "crma-0"))
    engine.step()
    engine.add(replace(background, interactive=False))
    engine.add(ask("interactive", AdapterSelection("task-1")))
    ended: list[str] = []
    for number in range(4, 3 * MAX_OVERTAKEN):  # there are always others in the queue
        engine.add(ask(f"base-{number}"))
        loads.end_one()
        ended += [output.request_id for output in engine.step() if output.finish_reason is not None]
        engine.check_integrity()
        if "interactive" in ended:
            return
    resident = sorted(pool.loras)
    raise AssertionError(f"it never ran; {len(ended)} others did, {resident} are resident")


def test_an_interactive_request_starts_though_background_decodes_use_the_whole_budget() -> None:
    engine = make(max_num_seqs=4, max_num_batched_tokens=4)
    for i in range(4):
        background = ask(f"background-{i}", prompt=(5,), max_tokens=60)
        engine.add(replace(background, interactive=False))
    for _ in range(4):
        engine.step()
    engine.add(ask("interactive", prompt=(5,), max_tokens=2))
    outputs = engine.step() + engine.step()
    assert "interactive" in {output.request_id for output in outputs}


def test_only_a_prompt_beside_other_sequences_is_cut_to_the_time_of_a_step() -> None:
    """Smaller steps cost more a token; a prompt that is alone makes nobody wait."""
    engine = make(max_num_batched_tokens=256, num_blocks=120)
    engine.budget = StepBudget(0.5)
    times = itertools.count()
    engine.clock = lambda: 10.0 * next(times)  # every step takes long
    counts = []
    for names in (("alone",), ("decodes", "beside")):
        for name in names:
            first = 2 if name == "alone" else 50  # nothing of it is cached
            length = 2 if name == "decodes" else 200
            engine.add(ask(name, prompt=tuple(range(first, first + length)), max_tokens=4))
            engine.step()
        counts.append(engine.scheduler.running[-1].num_computed_tokens)
        while engine.scheduler.unfinished():
            engine.step()
    assert counts == [200, FEWEST_TOKENS]
