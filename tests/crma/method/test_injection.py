"""crma.method.injection: hooks without a plan change nothing, and misfits are refused.

Mixed batches are tested in tests/numerics.
"""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import transformers
from dora import dora
from tiny import injection, lora
from tiny_configs import FAMILIES
from transformers import AutoModelForCausalLM

from crma.core.errors import ConfigError, InvalidAdapter, UnsupportedModel
from crma.core.selection import BASE, AdapterSelection
from crma.method.injection import Injection, Plan, plan_rows, target_names
from crma.method.lora import Lora

INPUT = torch.arange(3, 15).reshape(2, 6)


@torch.inference_mode()
def test_hooks_without_a_plan_change_no_bit() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval()
    before = model(INPUT).logits
    hooked = Injection(model)
    assert torch.equal(model(INPUT).logits, before)
    plan = Plan(tasks=[(None, lora(hooked, 4, "attention", seed=0))])
    with suppress(KeyError), hooked.active(plan):
        assert not torch.equal(model(INPUT).logits, before)
        raise KeyError("a forward pass that fails")
    assert torch.equal(model(INPUT).logits, before)


def test_base_rows_need_no_adapter_and_an_unknown_adapter_never_becomes_the_base() -> None:
    loras = {"a": lora(injection(), 4, "attention", seed=0)}
    assert plan_rows([BASE] * 3, loras, {}) == Plan([], [])
    for unknown in (AdapterSelection("z"), AdapterSelection("a", "z")):
        with pytest.raises(ConfigError, match="is not loaded"):
            plan_rows([BASE, unknown], loras, {})


def test_adapters_of_another_shape_are_refused() -> None:
    fitting = lora(injection(), 4, "k_proj")
    injection().check(fitting)
    pair = next(iter(fitting.pairs.values()))
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp"):
        with pytest.raises(InvalidAdapter, match="fits no linear of the model") as caught:
            injection().check(Lora(fitting.config, {path: pair}))
        assert caught.value.field == path
    for num_layers, hidden_size in ((3, 32), (2, 64)):
        with pytest.raises(InvalidAdapter, match="the backbone does not fit the model"):
            injection().check_backbone(num_layers, hidden_size)


def test_the_embedding_and_the_head_are_linears_outside_the_blocks() -> None:
    inj = injection("gpt_neox")
    assert inj.embedding == {"gpt_neox.embed_in": (32, 300)}
    assert inj.head == {"lm_head": (300, 32)}
    assert not inj.shapes.keys() & {*inj.embedding, *inj.head}
    fitting = dora(inj, 2)
    inj.check(fitting)
    pair = replace(fitting.pairs["gpt_neox.embed_in"], is_embedding=False)
    with pytest.raises(InvalidAdapter, match="fits no linear"):
        inj.check(Lora(fitting.config, {"gpt_neox.embed_in": pair}))


def test_a_bound_adapter_computes_what_the_one_that_was_learned_does() -> None:
    inj = injection("qwen2")
    learned = dora(inj, 3)
    bound = inj.bind(learned)
    found = []
    for each in (learned, bound, inj.bind(bound)):
        with torch.inference_mode(), inj.active(Plan(tasks=[(None, each)])):
            found.append(inj.model(INPUT).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_targets_are_found_by_the_structure_of_the_model() -> None:
    model = injection("gpt_neox").model
    attention = {"query_key_value", "dense"}
    assert set(target_names(model, "attention")) == attention
    assert set(target_names(model, "all-linear")) == attention | {"dense_h_to_4h", "dense_4h_to_h"}
    assert target_names(model, "q_proj, x,") == ("q_proj", "x")


T5 = {"d_model": 32, "d_ff": 32, "num_layers": 2}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2}
GPT_2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
REFUSED = [
    ("T5ForConditionalGeneration", T5, "it is an encoder-decoder"),
    ("MambaForCausalLM", MAMBA, "no attention to keep a KV cache for"),
    ("GPT2LMHeadModel", GPT_2, r"have no torch\.nn\.Linear"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_other_architectures_are_refused_with_the_reason(
    family: str, changes: dict[str, int], reason: str
) -> None:
    architecture = getattr(transformers, family)
    config = architecture.config_class(vocab_size=128, pad_token_id=0, **changes)
    with torch.device("meta"):
        model = architecture(config)
    with pytest.raises(UnsupportedModel, match=f"{family} cannot be served.*{reason}"):
        Injection(model)


def test_layers_that_keep_no_ordinary_kv_cache_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModel, match="it has layers of the type linear_attention"):
        Injection(model)
