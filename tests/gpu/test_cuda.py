"""The engine on a CUDA device against the oracle on the CPU."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_configs
import torch
from rounding import MAX_RATIO, Rounding, logprobs, of_tokens
from schedules import SELECTIONS, Answer, Call, World, mismatches, prompt, run

from crma.core.selection import AdapterSelection
from crma.method.injection import Injection
from crma.models.loading import cuda_dtype, resolve_dtype
from server.engine.native import adapter_pool
from server.engine.native.batch import build_batch
from server.engine.native.kv_cache import attend
from server.engine.native.sequence import Sequence
from server.engine.native.step import Chunk, Step
from server.engine.native.tiled_attention import can_attend_in_tiles
from server.engine.request import Request, SamplingParams

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-4  # of a log-probability, in fp32
GREEDY = SamplingParams(12, logprobs=2, prompt_logprobs=1)
SAMPLED = SamplingParams(
    12, temperature=0.8, top_p=0.9, top_k=20, seed=3, repetition_penalty=1.2, n=2, logprobs=2
)
SCHEDULE = [
    Call(selection, prompt(5 + 4 * i, i % 2), SAMPLED if i % 3 == 2 else GREEDY, arrival=i)
    for i, selection in enumerate(SELECTIONS)
]
# Preemption, chunked prompts, and more adapters than fit; for tiles, in blocks of their size.
TIGHT = {"room": 72, "block_size": 4, "max_num_batched_tokens": 24, "native": False}
TILED = {"room": 112, "block_size": 16, "max_num_batched_tokens": 24, "native": False}


@pytest.fixture(autouse=True)
def only_this_model() -> None:
    """torch keeps few compiled programs of one function; each model here has its own."""
    torch.compiler.reset()


def moved(injection: Injection, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of the model on a device in a dtype."""
    return Injection(tiny.fresh(injection).to(device, dtype))


def world(family: str) -> World:
    injection = tiny.injection(family)
    return World(injection, tiny.adapters(injection))


@pytest.mark.parametrize("family", [*tiny_configs.FAMILIES, *tiny_configs.WIDE])
def test_every_request_gets_what_it_gets_alone_on_the_cpu(
    family: str, device: torch.device
) -> None:
    """In fp32: shared prefixes, chunked prompts, preemption and more adapters than fit."""
    alone = world(family)
    on_device = World(moved(alone.injection, device), alone.adapters)
    limits = TILED if family in tiny_configs.WIDE else TIGHT
    answered, engine = run(on_device, SCHEDULE, **limits)
    for call, index, answer in answered:
        assert not mismatches(alone, answer, call, index, TOLERANCE)
    assert engine.counters.num_preemptions > 0
    is_tiled = device.type == "cuda" and family in tiny_configs.WIDE
    assert engine.runner.in_tiles == is_tiled


@pytest.mark.parametrize("family", ["qwen2", "llama_wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_a_short_dtype_our_errors_are_those_of_the_modules(
    family: str,
    dtype: torch.dtype,
    device: torch.device,
    record_property: Callable[[str, object], None],
) -> None:
    rounded = Injection(tiny.fresh(tiny.injection(family)).to(dtype).float())
    adapters = tiny.adapters(tiny.injection(family))
    exact = World(rounded, adapters)
    modules = World(moved(rounded, device, dtype), adapters)
    schedule = [Call(s, prompt(3 + 5 * i, i), GREEDY) for i, s in enumerate(SELECTIONS)]
    limits = {**TILED, "room": 640, "max_num_seqs": 16, "max_resident": 6}
    answered, _ = run(World(moved(rounded, device, dtype), adapters), schedule, **limits)
    rounding = Rounding()
    for call, _, answer in answered:
        expected = [of_tokens(one, call, answer) for one in (modules, exact)]
        rounding.add(logprobs(answer), *expected)
    record_property("rounding", str(rounding))
    assert rounding.ratio <= MAX_RATIO, rounding


def test_adapters_that_load_while_others_decode_change_no_answer(device: torch.device) -> None:
    """Twelve adapters in turn, room for four: each is loaded beside the steps, several times."""
    injection = tiny.injection()
    adapters = {f"lora-{i}": tiny.lora(injection, 2 + i % 3, "all-linear", i) for i in range(12)}
    alone = World(injection, adapters)
    drawn = random.Random(0).choices(sorted(adapters), k=36)
    schedule = [
        Call(AdapterSelection(d), prompt(3 + i % 9, i), GREEDY) for i, d in enumerate(drawn)
    ]
    engine, pool = tiny.make_engine(
        moved(injection, device), adapters, max_resident=4, num_blocks=128, native=False
    )
    answers = {str(i): Answer() for i in range(len(schedule))}
    for name, call in zip(answers, schedule, strict=True):
        engine.add(alone.request(name, call))
    deadline = time.monotonic() + 60
    while engine.scheduler.unfinished():
        assert time.monotonic() < deadline
        for output in engine.step():
            answers[output.request_id].take(output)
    pool.close()
    assert pool.counters.adapter_loads > len(adapters)
    for call, answer in zip(schedule, answers.values(), strict=True):
        assert not mismatches(alone, answer, call, 0, TOLERANCE)


def test_an_adapter_loads_on_a_stream_of_its_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA has streams")
    streams = []
    plain = adapter_pool.prepare

    def prepare(*arguments: Any) -> Any:
        streams.append(torch.cuda.current_stream(device))
        return plain(*arguments)

    monkeypatch.setattr(adapter_pool, "prepare", prepare)
    _, pool = tiny.make_engine(moved(tiny.injection(), device), tiny.adapters(tiny.injection()))
    for digest in ("task-0", "crma-0"):
        pool.load(digest)
    pool.close()
    assert len(streams) == 2
    assert torch.cuda.default_stream(device) not in streams
    assert all(pair.A.device.type == "cuda" for pair in pool.loras["task-0"].pairs.values())


def test_attention_gives_a_row_the_same_bits_beside_any_others(device: torch.device) -> None:
    cache = torch.randn(1, 32, 16, 4, 64, device=device)
    cache[:, 0] = 0
    if not can_attend_in_tiles(cache, 6):
        pytest.skip("not in tiles")

    def chunk(blocks: list[int], start: int, count: int) -> Chunk:
        sequence = Sequence(Request("r", prompt_ids=(5,) * (start + count)), 0)
        sequence.block_table = blocks
        return Chunk(sequence, start, count)

    own = chunk([3, 9, 1, 7], 50, 1)
    others = [chunk([2, 4, 5, 6, 8], 60 + i, 1) for i in range(7)] + [chunk([10, 11], 0, 30)]
    query = torch.randn(38, 6, 64, device=device)
    found = [
        attend(build_batch(Step(chunks), cache, in_tiles=True).paged, 0, query[:rows], 0.125)
        for chunks, rows in (([own], 1), ([own, *others], 38))
    ]
    assert torch.equal(found[0][0], found[1][0])


def test_the_dtype_is_that_of_the_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("the choice of a CPU has tests of its own")
    expected = cuda_dtype(torch.cuda.get_device_capability(device))
    assert resolve_dtype("auto", device) == expected
