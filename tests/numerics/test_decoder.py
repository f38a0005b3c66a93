"""server.engine.native.decoder: it computes what transformers' modules compute."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import tiny
import tiny_configs
import torch
from rounding import MAX_RATIO, MAX_RATIO_OF_ONE, Rounding, logprobs, of_tokens
from schedules import SELECTIONS, Answer, Call, World, prompt
from torch import Tensor

from crma.core.errors import ConfigError
from crma.method.injection import Injection
from server.engine.native.decoder import Decoder
from server.engine.native.engine import Engine
from server.engine.native.huge_pages import CACHE_LINE
from server.engine.native.kernel import Kernel
from server.engine.native.lora_stack import StackedRows
from server.engine.native.packed_blocks import PARTS
from server.engine.native.packed_weight import PackedWeight
from server.engine.native.rotary import Rotations
from server.engine.request import SamplingParams

COVERED = ("llama", "mistral", "qwen2", "qwen3")
TIED = "llama_tied"
TOLERANCE = 1e-4  # of a log-probability, in fp32
ALL_LOGPROBS = SamplingParams(9, logprobs=1, prompt_logprobs=1)
DTYPES = (torch.float32, torch.bfloat16)


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


def taken(
    family: str, dtype: torch.dtype, *, native: bool = False, is_rounded: bool = False
) -> tuple[Engine, World]:
    """An engine that has taken a model's weights, and an oracle with the same ones.

    Args:
        is_rounded: the weights are those of a checkpoint in bf16, which the kernel multiplies.
    """
    original = tiny.injection(family)
    if is_rounded:
        original = Injection(tiny.fresh(original).bfloat16().float())
    world = World(Injection(tiny.fresh(original).to(dtype)), tiny.adapters(original))
    model = Injection(tiny.fresh(original).to(dtype))
    limits = {"max_num_seqs": 16, "max_resident": 5}
    engine, _ = tiny.make_engine(model, world.adapters, take_weights=True, native=native, **limits)
    return engine, world


def is_rounded_like_the_modules(engine: Engine, world: World, family: str) -> bool:
    """Whether our errors in a short dtype are those of the modules, one by one and together."""
    dtype = world.injection.model.dtype
    rounded = tiny.fresh(tiny.injection(family)).to(dtype).float()
    exact = World(Injection(rounded), world.adapters)
    calls = one_call_a_selection(ALL_LOGPROBS)
    whole = Rounding()
    ratios = []
    for call, answer in zip(calls, answers(engine, world, calls), strict=True):
        by_modules, by_fp32 = (of_tokens(one, call, answer) for one in (world, exact))
        ratios.append(whole.add(logprobs(answer), by_modules, by_fp32).ratio)
    return whole.ratio <= MAX_RATIO and max(ratios) <= MAX_RATIO_OF_ONE


@pytest.mark.parametrize("family", tiny_configs.FAMILIES)
def test_it_covers_four_families(family: str) -> None:
    engine, _ = tiny.make_engine(tiny.injection(family), {})
    assert (engine.runner.decoder is not None) == (family in COVERED)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_it_computes_what_the_modules_compute(
    family: str, dtype: torch.dtype, native: bool
) -> None:
    """Every token of chunked prompts and of answers, with all selections in one batch.

    In fp32 to rounding; in bf16 it is as far from fp32 as the modules are.
    """
    engine, world = taken(family, dtype, native=native)
    if native and engine.runner.kernel is None:
        pytest.skip("no C++ compiler")
    parameters = engine.runner.injection.model.parameters()
    assert not sum(parameter.numel() for parameter in parameters)
    if dtype == torch.bfloat16:
        assert is_rounded_like_the_modules(engine, world, family)
        return
    calls = one_call_a_selection(ALL_LOGPROBS)
    for call, answer in zip(calls, answers(engine, world, calls), strict=True):
        expected = of_tokens(world, call, answer)
        torch.testing.assert_close(logprobs(answer), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", COVERED)
def test_in_fp16_it_rounds_like_the_modules(family: str) -> None:
    """What GPUs before Ampere serve in."""
    engine, world = taken(family, torch.float16)
    assert is_rounded_like_the_modules(engine, world, family)


@pytest.mark.parametrize("family", [*COVERED, TIED])
def test_weights_in_bf16_are_multiplied_in_fp32_and_are_in_memory_once(family: str) -> None:
    """As exact as fp32 weights, also where the embedding is the head's packed weight."""
    engine, world = taken(family, torch.float32, native=True, is_rounded=True)
    decoder = engine.runner.decoder
    assert decoder is not None
    if decoder.kernel is None:
        pytest.skip("no C++ compiler")
    if family == TIED:
        assert isinstance(decoder._embedding.weight, PackedWeight)
    calls = one_call_a_selection(ALL_LOGPROBS)
    for call, answer in zip(calls, answers(engine, world, calls), strict=True):
        expected = of_tokens(world, call, answer)
        torch.testing.assert_close(logprobs(answer), expected, atol=TOLERANCE, rtol=0)


def test_a_lost_adapter_shows_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task's deltas at one site of the last layer: the old bound of 0.5 let this pass."""
    engine, world = taken("llama", torch.bfloat16)
    site = engine.runner.decoder.sites[-1]
    plain = StackedRows.add_

    def add(self: StackedRows, at: Any, y: Tensor, x: Tensor) -> None:
        if at != site:
            plain(self, at, y, x)

    monkeypatch.setattr(StackedRows, "add_", add)
    assert not is_rounded_like_the_modules(engine, world, "llama")


def test_a_position_off_by_one_shows_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fifth token on: all positions shifted alike change nothing."""
    engine, world = taken("llama", torch.bfloat16)
    plain = Rotations.at

    def at(self: Rotations, positions: Tensor, num_positions: int, h: Tensor) -> Any:
        return plain(self, positions + (positions > 4), num_positions + 1, h)

    monkeypatch.setattr(Rotations, "at", at)
    assert not is_rounded_like_the_modules(engine, world, "llama")


def test_no_bit_of_an_answer_depends_on_neighbours_or_chunks() -> None:
    """Every log-probability, of most selections together, alone, and in chunks of 5 tokens.

    Not of an adapter on the embedding: its product is torch's.
    """
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    original = tiny.injection(TIED)
    inj = Injection(tiny.fresh(original).bfloat16().float())  # weights that the kernel multiplies
    world = World(inj, tiny.adapters(original))
    calls = one_call_a_selection(ALL_LOGPROBS)
    calls = [call for call in calls if call.selection.task_digest != "task-3"]

    def run(together: list[Call], max_num_batched_tokens: int) -> list[Answer]:
        engine, _ = tiny.make_engine(
            inj,
            world.adapters,
            max_num_seqs=len(together),
            max_num_batched_tokens=max_num_batched_tokens,
            max_resident=6,
            num_blocks=256,
            prefix_caching=False,
        )
        return answers(engine, world, together)

    for call, answer in zip(calls, run(calls, 600), strict=True):
        for max_num_batched_tokens in (5, 64):
            (alone,) = run([call], max_num_batched_tokens)
            assert alone.tokens == answer.tokens
            assert torch.equal(logprobs(alone), logprobs(answer))


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
        torch.testing.assert_close(logprobs(answer), logprobs(alone), atol=1e-4, rtol=0)


def test_int8_is_refused_for_a_model_that_the_decoder_does_not_cover() -> None:
    with pytest.raises(ConfigError, match="int8"):
        tiny.make_engine(tiny.injection("gpt_neox"), {}, int8=True)


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16 weights", "int8 weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", COVERED)
def test_blocks_in_one_call_have_the_bits_of_their_operations_one_by_one(
    family: str, dtype: torch.dtype, int8: bool
) -> None:
    """Chunks of prompts and answers, all selections in one batch, one of them a DoRA."""
    if tiny.library() is None:
        pytest.skip("no C++ compiler")
    original = tiny.injection(family)
    inj = Injection(tiny.fresh(original).bfloat16().to(dtype))  # weights that the kernel packs
    world = World(inj, tiny.adapters(original))
    calls = one_call_a_selection(ALL_LOGPROBS)

    def run(one_by_one: bool) -> tuple[list[Answer], list[int]]:
        limits = {"max_num_seqs": 16, "max_num_batched_tokens": 40, "max_resident": 6}
        engine, _ = tiny.make_engine(inj, world.adapters, num_blocks=256, int8=int8, **limits)
        decoder = engine.runner.decoder
        assert decoder is not None
        assert decoder.packed_blocks is not None
        taken = decoder.packed_blocks.taken = torch.zeros(len(PARTS), dtype=torch.int64)
        if one_by_one:
            decoder.packed_blocks = None
        return answers(engine, world, calls), taken.tolist()

    at_once, taken = run(one_by_one=False)
    one_by_one, not_taken = run(one_by_one=True)
    for expected, answer in zip(one_by_one, at_once, strict=True):
        assert answer.tokens == expected.tokens
        assert torch.equal(logprobs(answer), logprobs(expected))
    assert min(taken) > 0
    assert not any(not_taken)


def test_packed_weights_follow_each_other_in_memory() -> None:
    """A step reads them in this order, from front to back."""
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    model = tiny.injection().model.bfloat16().float()
    decoder = Decoder(model, kernel=Kernel(torch.float32, library.parent))
    assert decoder.packed_blocks is not None
    linears = [linear for block in decoder.packed_blocks._blocks for linear in block.linears]
    panels = [linear.packed.panels for linear in linears]
    for one, following in pairwise(panels):
        assert following.data_ptr() == one.data_ptr() + -(-one.nbytes // CACHE_LINE) * CACHE_LINE
