"""A fault in a step ends the sequences that it can be pinned to; others get what they get alone.

The faults are in the code that really runs: a hook of the model, the sampler, the tokenizer, the
pool of adapters.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from schedules import Answer, Call, World, mismatches, prompt
from tiny import PROMPT, ask
from transformers import PreTrainedTokenizerBase

from crma.core.selection import BASE, AdapterSelection
from server.engine.native import sampler, step_results
from server.engine.native.engine import Engine
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
    poison = min(set(range(2, tiny.VOCAB)) - tokens_of_neighbours(world))

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
    check(world, ask("bad", prompt=(5, tiny.VOCAB, 7)), lambda _: None)


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


def test_a_request_that_cannot_begin(world: World) -> None:
    options: dict[str, Any] = {"seed": 2**70}
    check(world, ask("bad", **options), lambda _: None)


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
    assert num_runs == 15
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
