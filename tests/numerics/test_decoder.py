"""The lean decoder against transformers' modules: the same weights, packed or not, theirs or taken from them."""

import pytest
import tiny
import torch
from schedules import SELECTIONS, Answer, Call, World, prompt

from crma.core.errors import ConfigError
from crma.method.injection import Injection
from server.engine.request import SamplingParams

COVERED = ("llama", "mistral", "qwen2", "qwen3")
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.5,
}  # of a log-probability; bf16 ones near -10 are off by 0.35


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_covers_four_families(family: str) -> None:
    engine, _ = tiny.make_engine(tiny.injection(family), {})
    assert (engine.runner.decoder is not None) == (family in COVERED)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_it_gives_what_the_modules_give(family: str, dtype: torch.dtype, native: bool) -> None:
    """Every token of prompts in chunks and of answers, all selections in one batch."""
    world = World(
        Injection(tiny.fresh(tiny.injection(family)).to(dtype)),
        tiny.adapters(tiny.injection(family)),
    )
    taken = Injection(tiny.fresh(tiny.injection(family)).to(dtype))
    engine, pool = tiny.make_engine(
        taken, world.adapters, max_num_seqs=16, max_resident=5, take_weights=True, native=native
    )
    if native and engine.runner.kernel is None:
        pytest.skip("no C++ compiler")
    assert not sum(parameter.numel() for parameter in taken.model.parameters())
    for digest in world.adapters:
        pool.load(digest)
    sampling = SamplingParams(9, logprobs=1, prompt_logprobs=1)
    calls = [
        Call(selection, prompt(3 + 5 * i, i), sampling) for i, selection in enumerate(SELECTIONS)
    ]
    answers = {str(i): Answer() for i in range(len(calls))}
    for name, call in zip(answers, calls, strict=True):
        engine.add(world.request(name, call))
    while engine.scheduler.unfinished():
        for output in engine.step():
            answers[output.request_id].take(output)
    for call, answer in zip(calls, answers.values(), strict=True):
        given = torch.tensor([one.logprob for one in (*answer.prompt_logprobs, *answer.logprobs)])
        tokens = torch.tensor([*call.prompt, *answer.tokens])[1:, None]
        expected = world.distribution(call, answer.tokens).gather(-1, tokens)[:, 0]
        torch.testing.assert_close(given, expected, atol=TOLERANCE[dtype], rtol=0)


def test_in_int8_a_request_gets_the_same_alone_and_in_company() -> None:
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    world = World(
        tiny.injection("qwen2"), tiny.adapters(tiny.injection("qwen2"))
    )  # its linears have biases
    sampling = SamplingParams(6, logprobs=0, prompt_logprobs=0)
    calls = [
        Call(selection, prompt(3 + 5 * i, i), sampling) for i, selection in enumerate(SELECTIONS)
    ]

    def answers(asked: list[Call]) -> list[Answer]:
        engine, pool = tiny.make_engine(
            world.injection,
            world.adapters,
            max_num_seqs=16,
            max_resident=5,
            prefix_caching=False,
            int8=True,
        )
        for digest in world.adapters:
            pool.load(digest)
        found = [Answer() for _ in asked]
        for i, call in enumerate(asked):
            engine.add(world.request(str(i), call))
        while engine.scheduler.unfinished():
            for output in engine.step():
                found[int(output.request_id)].take(output)
        return found

    together = answers(calls)
    for call, answer in zip(calls, together, strict=True):
        (alone,) = answers([call])
        assert alone.tokens == answer.tokens
        given, expected = (
            [each.logprob for each in (*a.prompt_logprobs, *a.logprobs)] for a in (answer, alone)
        )
        assert given == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match="int8"):
        tiny.make_engine(
            tiny.injection("gpt_neox" if "gpt_neox" in tiny.FAMILIES else "gemma2"), {}, int8=True
        )
