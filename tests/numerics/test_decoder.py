"""The lean decoder against transformers' modules: the same weights, packed or not, theirs or taken from them."""

import pytest
import tiny
import torch
from schedules import SELECTIONS, Answer, Call, World, prompt

from crma.injection import Injection
from server.engine.request import SamplingParams

COVERED = ("llama", "mistral", "qwen2", "qwen3")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}  # of a log-probability; bf16 ones near -10 are off by 0.35


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_covers_four_families(family: str) -> None:
    engine, _ = tiny.make_engine(tiny.injection(family), {})
    assert (engine.runner.decoder is not None) == (family in COVERED)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_it_gives_what_the_modules_give(family: str, dtype: torch.dtype, native: bool) -> None:
    """Every token of prompts in chunks and of answers, all selections in one batch."""
    world = World(Injection(tiny.fresh(tiny.injection(family)).to(dtype)), tiny.adapters(tiny.injection(family)))
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
    calls = [Call(selection, prompt(3 + 5 * i, i), sampling) for i, selection in enumerate(SELECTIONS)]
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
