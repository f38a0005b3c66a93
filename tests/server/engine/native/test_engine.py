"""server.engine.native.engine: how a sequence begins, ends and fails. That its tokens are right is in tests/numerics."""

from dataclasses import replace

import tiny
from schedules import Loads
from tiny import PROMPT, ask

from crma.core.selection import AdapterSelection
from crma.models.reference import generate
from server.engine.native.engine import MAX_OVERTAKEN, Engine, model_stop_ids
from server.engine.request import FinishReason, Request, RequestOutput, Timings


def make(**limits: int) -> Engine:
    return tiny.make_engine(tiny.injection(), {}, **limits)[0]


def run(engine: Engine, *requests: Request) -> list[RequestOutput]:
    for request in requests:
        engine.add(request)
    outputs = []
    while engine.scheduler.unfinished():
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
    for ignore_eos, reason, tokens in (
        (False, FinishReason.STOP, 2),
        (True, FinishReason.LENGTH, 6),
    ):
        outputs = run(engine, ask(ignore_eos=ignore_eos))
        assert (last(outputs).finish_reason, sum((o.token_ids for o in outputs), ())) == (
            reason,
            oracle()[:tokens],
        )
        assert not any(o.logprobs for o in outputs), "they were not asked for"


def test_a_stop_string_ends_it_and_is_no_part_of_the_text() -> None:
    text = tiny.tokenizer().decode(oracle())
    stop = text[2:4]
    outputs = run(make(), ask(stop=(stop,)))
    assert "".join(o.text for o in outputs) == text[: text.index(stop)]
    assert (last(outputs).finish_reason, last(outputs).completion_tokens < 6) == (
        FinishReason.STOP,
        True,
    )


def test_times_are_seconds_from_arrival_and_counters_count() -> None:
    engine = make(max_num_seqs=1)
    now = [0.0]
    engine.clock = lambda: now[0]
    for name in ("first", "second"):
        engine.add(ask(name, max_tokens=2))
    outputs = []
    while engine.scheduler.unfinished():
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
    assert [(o.index, o.finish_reason, o.error) for o in ended] == [
        (i, FinishReason.ABORT, None) for i in (0, 1)
    ]
    assert "".join(o.text for o in ended) == tiny.tokenizer().decode(oracle()[:1])
    assert engine.abort("r") == []
    assert engine.step() == []
    engine.check_integrity()


def test_who_finds_no_room_for_its_adapter_is_passed_a_while_and_then_comes_next() -> None:
    """Two adapters fit; two long answers keep them, and short ones that use them pass."""
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
        ended += [o.request_id for o in engine.step() if o.finish_reason]
        engine.check_integrity()
        loads.end_one()
    passed = [name for name in ended[: ended.index("cold")] if name.startswith("short")]
    assert MAX_OVERTAKEN <= len(passed) <= MAX_OVERTAKEN + 4, "and those that ran already"
    assert len(ended) == 153


def test_cancelling_an_adapter_ends_who_runs_with_it_and_nobody_else() -> None:
    engine, pool = tiny.make_engine(
        tiny.injection(), tiny.adapters(tiny.injection()), executor=(loads := Loads())
    )
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


def test_the_models_end_tokens_are_those_of_both_its_files() -> None:
    assert [model_stop_ids(tiny.tokenizer(), eos) for eos in (None, 7, [7, 8])] == [
        {1},
        {1, 7},
        {1, 7, 8},
    ]


def test_a_waiting_ablation_item_keeps_no_room_from_an_interactive_requests_adapter() -> None:
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
    item = ask("item", AdapterSelection("task-0", "crma-0"))
    engine.step()
    engine.add(replace(item, interactive=False))
    engine.add(ask("interactive", AdapterSelection("task-1")))
    ended: list[str] = []
    for number in range(4, 3 * MAX_OVERTAKEN):  # others always wait
        engine.add(ask(f"base-{number}"))
        loads.end_one()
        ended += [output.request_id for output in engine.step() if output.finish_reason is not None]
        engine.check_integrity()
        if "interactive" in ended:
            return
    raise AssertionError(
        f"it never ran; {len(ended)} others did, {sorted(pool.loras)} are resident"
    )


def test_an_interactive_request_takes_tokens_from_items_that_decode_with_all_of_the_budget() -> (
    None
):
    engine = make(max_num_seqs=4, max_num_batched_tokens=4)
    for i in range(4):
        engine.add(replace(ask(f"item-{i}", prompt=(5,), max_tokens=60), interactive=False))
    for _ in range(4):
        engine.step()
    engine.add(ask("interactive", prompt=(5,), max_tokens=2))
    assert "interactive" in {output.request_id for _ in range(2) for output in engine.step()}
