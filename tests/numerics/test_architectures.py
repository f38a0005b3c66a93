"""Every supported family: it starts as the base model, rows are their own, decoding is HF's."""

import pytest
import torch
from tiny import FAMILIES, backbone, injection, lora
from torch import Tensor

from crma.core.selection import BASE, AdapterSelection
from crma.method.backbone import Backbone, CrmaConfig
from crma.method.injection import Injection, Plan, plan_rows, target_names
from crma.method.lora import LoraConfig, new_lora
from crma.models.reference import generate

INPUT = torch.arange(3, 48).reshape(5, 9)
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(inj: Injection, plan: Plan, rows: Tensor = INPUT) -> Tensor:
    with torch.inference_mode(), inj.active(plan):
        return inj.model(rows).logits


@every_family
def test_before_training_the_adapted_model_is_the_base_model(family: str) -> None:
    inj, generator = injection(family), torch.Generator().manual_seed(0)
    start = Backbone(CrmaConfig(len(inj.blocks), inj.hidden_size), generator)
    config = LoraConfig(4, 8.0, target_names(inj.model, "all-linear"))
    untrained = new_lora(config, inj.shapes, generator)
    plan = Plan([(None, untrained)], [(None, start.folded("cpu", torch.float32))])
    assert torch.equal(logits(inj, plan), logits(inj, Plan()))


@every_family
def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(family: str) -> None:
    inj = injection(family)
    tasks = {"a": lora(inj, 4, "all-linear", seed=0), "b": lora(inj, 2, "attention", seed=1)}
    layers = {
        name: backbone(inj, seed).folded("cpu", torch.float32) for seed, name in enumerate("xy")
    }
    chosen = [
        AdapterSelection(*pair)
        for pair in (("a", "x"), (None, "y"), (None, None), ("b", None), ("a", "y"))
    ]
    together, base = logits(inj, plan_rows(chosen, tasks, layers)), logits(inj, Plan())
    for i, selection in enumerate(chosen):
        alone = logits(inj, plan_rows([selection], tasks, layers), INPUT[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
        if selection == BASE:
            assert torch.equal(together[i], base[i])
        else:
            assert (together[i] - base[i]).abs().max() > 0.1


@every_family
@pytest.mark.parametrize("adapted", [False, True])
def test_the_oracle_decodes_as_transformers_does(family: str, adapted: bool) -> None:
    inj = injection(family)
    layers = backbone(inj, seed=0).folded("cpu", torch.float32)
    plan = (
        Plan([(None, lora(inj, 4, "all-linear", seed=0))], [(None, layers)]) if adapted else Plan()
    )
    prompt = list(range(5, 25))  # longer than the sliding windows
    made = generate(inj, prompt, plan, max_tokens=10)
    with torch.inference_mode(), inj.active(plan):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        theirs = inj.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=10, eos_token_id=None
        )
    assert list(made.token_ids) == theirs[0, len(prompt) :].tolist()
    scored = logits(inj, plan, theirs)[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = scored.gather(1, theirs[0, len(prompt) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(made.logprobs), expected, atol=1e-4, rtol=0)
