"""Every supported model family: injection is exact, and the oracle decodes as transformers does."""

import pytest
import torch
from tiny import backbone, injection, lora
from tiny_configs import FAMILIES
from torch import Tensor

from crma.core.selection import BASE, AdapterSelection
from crma.method.backbone import Backbone, CrmaConfig
from crma.method.injection import Injection, Plan, plan_rows, target_names
from crma.method.lora import LoraConfig, new_lora
from crma.models.reference import generate

INPUT = torch.arange(3, 48).reshape(5, 9)
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(inj: Injection, plan: Plan, token_ids: Tensor = INPUT) -> Tensor:
    with torch.inference_mode(), inj.active(plan):
        return inj.model(token_ids).logits


@every_family
def test_before_training_the_adapted_model_is_the_base_model(family: str) -> None:
    inj = injection(family)
    generator = torch.Generator().manual_seed(0)
    new_backbone = Backbone(CrmaConfig(len(inj.blocks), inj.hidden_size), generator)
    config = LoraConfig(4, 8.0, target_names(inj.model, "all-linear"))
    untrained = new_lora(config, inj.shapes, generator)
    plan = Plan([(None, untrained)], [(None, new_backbone.folded("cpu", torch.float32))])
    assert torch.equal(logits(inj, plan), logits(inj, Plan()))


@every_family
def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(family: str) -> None:
    inj = injection(family)
    tasks = {"a": lora(inj, 4, "all-linear", seed=0), "b": lora(inj, 2, "attention", seed=1)}
    backbones = {
        name: backbone(inj, seed).folded("cpu", torch.float32) for seed, name in enumerate("xy")
    }
    selections = [
        AdapterSelection("a", "x"),
        AdapterSelection(None, "y"),
        BASE,
        AdapterSelection("b", None),
        AdapterSelection("a", "y"),
    ]
    together = logits(inj, plan_rows(selections, tasks, backbones))
    base = logits(inj, Plan())
    for i, selection in enumerate(selections):
        alone = logits(inj, plan_rows([selection], tasks, backbones), INPUT[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
        if selection == BASE:
            assert torch.equal(together[i], base[i])
        else:
            assert (together[i] - base[i]).abs().max() > 0.1


@every_family
@pytest.mark.parametrize("adapted", [False, True])
def test_the_oracle_decodes_as_transformers_does(family: str, adapted: bool) -> None:
    inj = injection(family)
    plan = Plan()
    if adapted:
        folded = backbone(inj, seed=0).folded("cpu", torch.float32)
        plan = Plan([(None, lora(inj, 4, "all-linear", seed=0))], [(None, folded)])
    prompt = list(range(5, 25))  # longer than the sliding windows
    ours = generate(inj, prompt, plan, max_tokens=10)
    with torch.inference_mode(), inj.active(plan):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        theirs = inj.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=10, eos_token_id=None
        )
    answer = theirs[0, len(prompt) :]
    assert list(ours.token_ids) == answer.tolist()
    scores = logits(inj, plan, theirs)[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = scores.gather(1, answer[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours.logprobs), expected, atol=1e-4, rtol=0)
