"""server.engine.native.decoder: it computes what transformers' modules compute."""

from collections.abc import Sequence

import pytest
import tiny
import torch
from schedules import SELECTIONS, Answer, Call, World, prompt

from crma.core.errors import ConfigError
from crma.method.injection import Injection
from server.engine.native.engine import Engine
from server.engine.request import SamplingParams

COVERED = ("llama", "mistral", "qwen2", "qwen3")
# Of a log-probability. In bf16, those near -10 are off by up to 0.35.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}


def one_call_a_selection(sampling: SamplingParams) -> list[Call]:
    return [
        Call(selection, prompt(3 + 5 * i, i), sampling) for i, selection in enumerate(SELECTIONS)
    ]


def answers(engine: Engine, world: World, calls: Sequence[Call]) -> list[Answer]:
    """Run calls together, with every adapter resident, until all have ended."""
    for digest in world.adapters:
        engine.pool.load(digest)
    found = [Answer() for _ in calls]
    for i, call in enumerate(calls):
        engine.add(world.request(str(i), call))
    while engine.scheduler.unfinished():
        for output in engine.step():
            found[int(output.request_id)].take(output)
    return found


def logprobs(answer: Answer) -> list[float]:
    return [one.logprob for one in (*answer.prompt_logprobs, *answer.logprobs)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_covers_four_families(family: str) -> None:
    engine, _ = tiny.make_engine(tiny.injection(family), {})
    assert (engine.runner.decoder is not None) == (family in COVERED)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_it_computes_what_the_modules_compute(
    family: str, dtype: torch.dtype, native: bool
) -> None:
    """Every token of chunked prompts and of answers, with all selections in one batch."""
    original = tiny.injection(family)
    world = World(Injection(tiny.fresh(original).to(dtype)), tiny.adapters(original))
    taken = Injection(tiny.fresh(original).to(dtype))
    engine, _ = tiny.make_engine(
        taken, world.adapters, max_num_seqs=16, max_resident=5, take_weights=True, native=native
    )
    if native and engine.runner.kernel is None:
        pytest.skip("no C++ compiler")
    assert not sum(parameter.numel() for parameter in taken.model.parameters())
    calls = one_call_a_selection(SamplingParams(9, logprobs=1, prompt_logprobs=1))
    for call, answer in zip(calls, answers(engine, world, calls), strict=True):
        given = torch.tensor(logprobs(answer))
        tokens = torch.tensor([*call.prompt, *answer.tokens])[1:, None]
        expected = world.distribution(call, answer.tokens).gather(-1, tokens)[:, 0]
        torch.testing.assert_close(given, expected, atol=TOLERANCE[dtype], rtol=0)


def test_in_int8_a_request_gets_the_same_alone_and_in_a_batch() -> None:
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    inj = tiny.injection("qwen2")  # its linears have biases
    world = World(inj, tiny.adapters(inj))
    calls = one_call_a_selection(SamplingParams(6, logprobs=0, prompt_logprobs=0))

    def run(together: list[Call]) -> list[Answer]:
        options = {"max_num_seqs": 16, "max_resident": 5, "prefix_caching": False, "int8": True}
        engine, _ = tiny.make_engine(inj, world.adapters, **options)
        return answers(engine, world, together)

    for call, answer in zip(calls, run(calls), strict=True):
        (alone,) = run([call])
        assert alone.tokens == answer.tokens
        assert logprobs(answer) == pytest.approx(logprobs(alone), abs=1e-4)


def test_int8_is_refused_for_a_model_that_the_decoder_does_not_cover() -> None:
    with pytest.raises(ConfigError, match="int8"):
        tiny.make_engine(tiny.injection("gpt_neox"), {}, int8=True)
