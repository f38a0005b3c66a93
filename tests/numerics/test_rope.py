"""Rotary frequencies that depend on a sequence's length: each sequence has its own.

Up to 12 tokens the frequencies of the tiny models are not scaled. tests/numerics/test_mixed_batches
runs them through random schedules too.
"""

import pytest
import tiny
import tiny_configs
import torch
from schedules import Call, World, mismatches, prompt, run
from torch import Tensor, nn

from crma.core.errors import UnsupportedModel
from crma.core.selection import BASE
from crma.method.injection import Injection
from crma.models.reference import forget_lengths, generate
from crma.models.rope import RopeScaling, context_length, rope_scaling
from server.engine.native.rotary import Rotations, ScaledRotary
from server.engine.request import SamplingParams

every_scaled = pytest.mark.parametrize("family", tiny_configs.SCALED)
TOLERANCE = 1e-4
PLAIN = SamplingParams(8, logprobs=2, prompt_logprobs=1)


def world(family: str) -> World:
    return World(tiny.injection(family), tiny.adapters(tiny.injection(family)))


def check(there: World, schedule: list[Call], **limits: int) -> None:
    answered, _ = run(there, schedule, **limits)
    for call, index, answer in answered:
        wrong = mismatches(there, answer, call, index, TOLERANCE)
        assert not wrong, (wrong, len(call.prompt), answer)


def whole_pass(model: nn.Module, ids: list[int]) -> Tensor:
    """Log-probabilities [vocab] of the next token, from transformers' pass over the sequence."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@every_scaled
@pytest.mark.parametrize("length", [3, 9, 12, 13, 40])
def test_a_sequence_alone_gets_what_transformers_generates(family: str, length: int) -> None:
    """On a model that has computed nothing before: transformers keeps frequencies for later."""
    inj = tiny.injection(family)
    ids = torch.tensor([prompt(length)])
    theirs = tiny.fresh(inj).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=None,
    )
    call = Call(BASE, prompt(length), PLAIN)
    answered, _ = run(world(family), [call])
    if family != "llama_longrope":  # only Phi-3's generate computes anew what it has outgrown
        assert answered[0][2].tokens == theirs[0, length:].tolist()
        assert generate(inj, prompt(length), max_tokens=8).token_ids == tuple(answered[0][2].tokens)
    check(world(family), [call])


@pytest.mark.parametrize("family", ["phi3_longrope", "llama_longrope"])
@pytest.mark.parametrize("length", [3, 9, 12, 13, 40])
def test_longrope_is_one_pass_over_the_whole_sequence_at_every_token(
    family: str, length: int
) -> None:
    model = tiny.fresh(tiny.injection(family))
    answered, _ = run(world(family), [Call(BASE, prompt(length), PLAIN)])
    answer = answered[0][2]
    for number, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        expected = whole_pass(model, [*prompt(length), *answer.tokens[:number]])
        assert abs(expected[token].item() - logprob.logprob) <= TOLERANCE


@every_scaled
@pytest.mark.parametrize("budget", [5, 64])
def test_short_and_long_sequences_share_batches(family: str, budget: int) -> None:
    """One long row gave every other row its frequencies, and left them for the next steps."""
    lengths = [40, 3, 9, 13, 11, 60, 5]
    schedule = [Call(BASE, prompt(n), PLAIN, arrival=i // 2) for i, n in enumerate(lengths)]
    check(world(family), schedule, room=400, max_num_batched_tokens=budget)


@every_scaled
def test_no_block_is_shared_between_frequencies(family: str) -> None:
    """The same beginning, of a short, a long and a longer prompt, one after the other."""
    lengths = [12, 40, 12, 60, 40]
    plain = SamplingParams(8, logprobs=2)  # without the prompt's, for which nothing is shared
    schedule = [Call(BASE, prompt(n), plain, arrival=30 * i) for i, n in enumerate(lengths)]
    check(world(family), schedule, room=800, block_size=4, max_num_seqs=1)


@every_scaled
def test_blocks_of_the_same_frequencies_are_shared(family: str) -> None:
    call = Call(BASE, prompt(40), SamplingParams(1))
    again = Call(BASE, prompt(40), SamplingParams(1), arrival=20)
    _, engine = run(world(family), [call, again], block_size=4)
    assert engine.counters.prefix_cache_hits == 36


def test_frequencies_that_cannot_be_followed_are_refused_by_name() -> None:
    inj = Injection(tiny.fresh(tiny.injection("llama_longrope")))
    inj.model.second = inj.model.model.rotary_emb.__class__(inj.model.config)
    cases = [(inj.model, "longrope"), (tiny.injection("llama_longrope").model, "mixed")]
    for model, kind in cases:
        with pytest.raises(UnsupportedModel, match="beyond 12 tokens") as caught:
            ScaledRotary(model, RopeScaling(kind, 12))
        assert (caught.value.field, caught.value.value) == ("rope_type", kind)
        assert caught.value.allowed == "max_model_len <= 12"


def test_the_context_of_a_dynamic_model_is_its_factor_times_the_original() -> None:
    lengths = {
        name: context_length(tiny.injection(name).model.config)
        for name in ("llama", "phi3_longrope", "llama_dynamic")
    }
    assert lengths == {"llama": 512, "phi3_longrope": 512, "llama_dynamic": 96}


def test_models_of_one_table_and_of_tables_by_layer_are_told_apart() -> None:
    assert rope_scaling(tiny.injection("llama").model.config) is None
    assert rope_scaling(tiny.injection("gemma3").model.config) is None
    config = tiny_configs.FAMILIES["gemma3"]()
    config.rope_parameters["full_attention"] = tiny_configs.LONGROPE
    assert rope_scaling(config) == RopeScaling("mixed", 12)
    forget_lengths(tiny.injection("gemma3").model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_that_are_kept_have_the_bits_of_those_that_are_computed(
    dtype: torch.dtype,
) -> None:
    """Of any batch, before and after more positions are needed than were kept."""
    rotary = tiny.injection("llama").model.model.rotary_emb
    h = torch.zeros(1, dtype=dtype)
    kept = Rotations(rotary, is_steady=True)
    computed = Rotations(rotary, is_steady=False)
    for positions in ([0], [1023], [3, 1, 1024], list(range(7, 900)), [5000, 2], [4095]):
        found = kept.at(torch.tensor(positions), max(positions) + 1, h)
        expected = computed.at(torch.tensor(positions), max(positions) + 1, h)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert one.shape[:2] == (len(positions), 1)
            assert one.is_contiguous()
