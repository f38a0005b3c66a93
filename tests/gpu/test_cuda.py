"""The engine on a CUDA device against the oracle on the CPU."""

import pytest
import tiny
import torch
from schedules import SELECTIONS, Call, World, mismatches, prompt, run

from crma.method.injection import Injection
from server.engine.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(12, logprobs=2, prompt_logprobs=1)
SAMPLED = SamplingParams(
    12, temperature=0.8, top_p=0.9, top_k=20, seed=3, repetition_penalty=1.2, n=2, logprobs=2
)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_request_on_cuda_gets_what_it_gets_alone_on_the_cpu(family: str) -> None:
    """In fp32: shared prefixes, chunked prompts, preemption and more adapters than fit."""
    world = World(tiny.injection(family), tiny.adapters(tiny.injection(family)))
    schedule = [
        Call(selection, prompt(5 + 4 * i, i % 2), SAMPLED if i % 3 == 2 else GREEDY, arrival=i)
        for i, selection in enumerate(SELECTIONS)
    ]
    on_cuda = Injection(tiny.fresh(world.injection).to("cuda"))
    limits = {"room": 72, "block_size": 4, "max_num_batched_tokens": 24}
    answered, engine = run(World(on_cuda, world.adapters), schedule, **limits)
    for call, index, answer in answered:
        assert not mismatches(world, answer, call, index, 1e-4)
    assert engine.counters.num_preemptions > 0
