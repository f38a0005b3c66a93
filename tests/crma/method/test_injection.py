"""crma.method.injection: off is absent, each row gets its own, and what does not fit is refused."""

from contextlib import suppress

import pytest
import torch
import transformers
from tiny import FAMILIES, injection, lora
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
    with (
        suppress(KeyError),
        hooked.active(Plan(tasks=[(None, lora(hooked, 4, "attention", seed=0))])),
    ):
        assert not torch.equal(model(INPUT).logits, before)
        raise KeyError("a forward pass that fails")
    assert torch.equal(model(INPUT).logits, before)


def test_rows_of_the_base_need_nothing_and_nothing_unknown_becomes_the_base() -> None:
    loras = {"a": lora(injection(), 4, "attention", seed=0)}
    assert plan_rows([BASE] * 3, loras, {}) == Plan([], [])
    for unknown in (AdapterSelection("z"), AdapterSelection("a", "z")):
        with pytest.raises(ConfigError, match="is not loaded"):
            plan_rows([BASE, unknown], loras, {})


def test_adapters_of_another_shape_are_refused() -> None:
    fitting = lora(injection(), 4, "k_proj")
    injection().check(fitting)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp"):
        with pytest.raises(InvalidAdapter, match="fits no module"):
            injection().check(Lora(fitting.config, {path: next(iter(fitting.pairs.values()))}))
    for shape in ((3, 32), (2, 64)):
        with pytest.raises(InvalidAdapter, match="backbone of the wrong shape"):
            injection().check_backbone(*shape)


def test_targets_go_by_structure() -> None:
    model = injection("gpt_neox").model
    attention = {"query_key_value", "dense"}
    assert set(target_names(model, "attention")) == attention
    assert set(target_names(model, "all-linear")) == attention | {"dense_h_to_4h", "dense_4h_to_h"}
    assert target_names(model, "q_proj, x,") == ("q_proj", "x")


REFUSED = [
    (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 32, "num_layers": 2},
        "it is an encoder-decoder",
    ),
    (
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2},
        "no attention to keep a KV cache for",
    ),
    ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "have no torch.nn.Linear"),
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
