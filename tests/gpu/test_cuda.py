"""On a CUDA device: the same equalities as on the CPU, and memory that comes back."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, adapters
from transformers import AutoModelForCausalLM

from crma.generate import generate
from crma.injection import Injection, plan_rows
from crma.lora import Lora
from crma.selection import AdapterSelection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SELECTIONS = [
    AdapterSelection(),
    AdapterSelection("task-0"),
    AdapterSelection("task-1", "crma-0"),
    AdapterSelection(None, "crma-1"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_on_cuda_is_each_row_alone_on_the_cpu(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().requires_grad_(False)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    injection = Injection(model)
    made = adapters(injection)
    ids = torch.randint(2, 250, (len(SELECTIONS), 9), generator=torch.Generator().manual_seed(1))
    logits = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        loras = {d: a.to(device, torch.float32) for d, a in made.items() if isinstance(a, Lora)}
        backbones = {d: a.folded(device, torch.float32) for d, a in made.items() if not isinstance(a, Lora)}
        rows = SELECTIONS if device == "cuda" else [[s] for s in SELECTIONS]
        with torch.inference_mode():
            if device == "cuda":
                with injection.active(plan_rows(rows, loras, backbones, device)):
                    logits[device] = model(ids.to(device)).logits.cpu()
            else:
                alone = []
                for row, one in zip(ids, rows, strict=True):
                    with injection.active(plan_rows(one, loras, backbones)):
                        alone.append(model(row[None]).logits[0])
                logits[device] = torch.stack(alone)
    torch.testing.assert_close(logits["cuda"], logits["cpu"], atol=1e-4, rtol=1e-4)


def test_the_oracle_runs_on_cuda_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval().to("cuda", torch.bfloat16)
    injection = Injection(model)
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        assert generate(injection, [5, 6, 7], max_tokens=8).finish_reason in ("stop", "length")
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
