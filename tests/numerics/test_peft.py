"""PEFT as an independent oracle, fp32: its adapters through our import and hooks, ours through its loader."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny import FAMILIES, injection
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from crma.injection import Injection, Plan, target_names
from crma.lora import Lora
from crma.pull import BaseModel
from crma.store import AdapterStore

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT reads what is deprecated
]
BASE = BaseModel("tiny", "sha256:" + "a" * 64, Path("unused"), {})
INPUT = torch.arange(3, 39).reshape(4, 9)
TOLERANCE = 1e-5


def fresh(inj: Injection) -> nn.Module:
    """The same model again, for PEFT to change."""
    model = AutoModelForCausalLM.from_config(
        inj.model.config, attn_implementation=inj.model.config._attn_implementation
    )
    model.load_state_dict(inj.model.state_dict())
    return model.eval()


def made_by_peft(inj: Injection, folder: Path, seed: int, rank: int, which: str) -> peft.PeftModel:
    """A PEFT LoRA with random A and B, saved in `folder`."""
    targets = list(target_names(inj.model, which))
    model = peft.get_peft_model(fresh(inj), peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(str(folder))
    return model.eval()


def imported(inj: Injection, store: AdapterStore, folder: Path, name: str) -> Lora:
    return store.import_peft(folder, name, BASE, shapes=inj.shapes).load(inj.shapes)


def close(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """Within the tolerance of each other, and far from the base model."""
    difference = (ours - theirs).abs().max().item()
    assert difference < TOLERANCE, f"largest difference of a logit: {difference:.2e}"
    assert (theirs - base).abs().max() > 1e4 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_an_adapter_from_peft_means_the_same_here_and_back_in_peft(family: str, tmp_path: Path) -> None:
    inj, store = injection(family), AdapterStore(tmp_path / "store")
    theirs = made_by_peft(inj, tmp_path / "peft", 0, 4, "all-linear")(INPUT).logits
    base = inj.model(INPUT).logits
    lora = imported(inj, store, tmp_path / "peft", "task")
    with inj.active(Plan(tasks=[(None, lora)])):
        close(inj.model(INPUT).logits, theirs, base)
    published = str(store.task("task").path)
    close(peft.PeftModel.from_pretrained(fresh(inj), published).eval()(INPUT).logits, theirs, base)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@torch.inference_mode()
def test_a_batch_of_two_adapters_and_the_base_gives_what_peft_gives(family: str, tmp_path: Path) -> None:
    inj, store = injection(family), AdapterStore(tmp_path / "store")
    model = made_by_peft(inj, tmp_path / "first", 1, 4, "all-linear")
    made_by_peft(inj, tmp_path / "second", 2, 2, "attention")
    model.load_adapter(str(tmp_path / "second"), "second")
    theirs = model(INPUT, adapter_names=["second", "__base__", "default", "second"]).logits
    first, second = (imported(inj, store, tmp_path / name, name) for name in ("first", "second"))
    base = inj.model(INPUT).logits
    with inj.active(Plan(tasks=[(torch.tensor([2]), first), (torch.tensor([0, 3]), second)])):
        ours = inj.model(INPUT).logits
    for row in (0, 2, 3):
        close(ours[row], theirs[row], base[row])
    assert torch.equal(ours[1], base[1])
