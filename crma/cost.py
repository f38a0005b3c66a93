"""What a training run needs, before it is run: `crma estimate`. Of the model only its config is read.

Counted: frozen weights; trained parameters with their gradients and AdamW's two moments; and in one step of the model's
own code on tensors without numbers (torch's device "meta") what autograd keeps, and the FLOPs of all products, backward
as well. From the data: the batches, padding included, as training makes them; the largest sets the memory. Measured:
FLOPS. Assumed: attention by plain products, as on the CPU; for the models of `model_shapes.json`, which need not be
pulled, the default model's tokenizer. Left out: the process itself, holes in the heap of the CPU's allocator, and what
the backward pass needs for a moment. How far it was off: ARCHITECTURE.md, decisions.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from crma.adapter import FoldedPair
from crma.arms import ARMS
from crma.config import TrainConfig
from crma.data import load_split
from crma.evaluate import Batch, Evaluator, collate
from crma.injection import Injection, Plan
from crma.lora import new_lora
from crma.model import load_tokenizer, resolve_device, resolve_dtype
from crma.prompts import chat_format
from crma.protocol import lora_config, new_backbone
from crma.pull import DEFAULT_MODEL, find_base
from crma.train import epoch_batches

FLOPS = 2.5e11  # a second, of one thread: the median of crma/results/quick, on the CPU that its records name
SHAPES = Path(__file__).with_name("model_shapes.json")  # public values


def estimate(config: TrainConfig, flops: float = FLOPS) -> dict[str, Any]:
    """Memory in GB (1e9 bytes) and hours of training at `flops` a second, and the counts behind them.

    Raises PullError for a model that is neither pulled nor in SHAPES, DataError for a task without data.
    """
    known = json.loads(SHAPES.read_text("utf-8")).get(config.model)
    base = find_base(DEFAULT_MODEL if known else config.model)
    shape = AutoConfig.for_model(**known) if known else AutoConfig.from_pretrained(base.path, local_files_only=True)
    dtype, tokenizer = resolve_dtype(config.dtype, resolve_device("auto")), load_tokenizer(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="eager").eval()
    injection, batches = Injection(model.requires_grad_(False)), []
    for task in config.tasks:
        examples = load_split(task, "train")[: config.train_items or None]
        rows = Evaluator(injection, tokenizer, chat_format(tokenizer)).encode(examples)
        for epoch in range(config.epochs):
            groups = epoch_batches(rows, config.batch_size, f"{config.seed}/{task}/{epoch}")
            batches += [collate([rows[i] for i in indices], 0, "meta") for indices in groups]
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    trained, kept, products = _step(config, injection, largest)
    frozen, tokens = sum(p.numel() for p in model.parameters()), sum(batch.input_ids.numel() for batch in batches)
    gigabytes = {"weights": frozen * dtype.itemsize / 1e9, "trained": trained * 16 / 1e9, "activations": kept / 1e9}
    work = products * tokens / largest.input_ids.numel()
    found = {"model": config.model, "dtype": str(dtype), "parameters": frozen, "trained_parameters": trained}
    found |= {"gigabytes": gigabytes | {"total": sum(gigabytes.values())}, "largest_batch": [*largest.input_ids.shape]}
    return found | {"steps": len(batches), "tokens": tokens, "flops": work, "hours": work / flops / 3600}


def _step(config: TrainConfig, injection: Injection, batch: Batch) -> tuple[int, int, int]:
    """Of one step: trained parameters, bytes that autograd keeps, FLOPs."""
    model, kept, crma = injection.model, {}, ARMS[config.arm].crma
    targets, backbone = lora_config(config, injection), new_backbone(config, injection).to("meta")
    with torch.device("meta"):
        lora = new_lora(targets, injection.shapes, torch.Generator())
    trained = [*lora.parameters(), *(backbone.parameters() if crma else ())]
    pairs = [FoldedPair(A, B) for A, B in zip(backbone.R.to(model.dtype), backbone.W.to(model.dtype), strict=True)]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # a view keeps the whole
        return tensor

    plan = Plan([(None, lora)], [(None, pairs)] if crma else [])
    with (
        injection.active(plan),
        saved_tensors_hooks(keep, lambda kept: kept),
        FlopCounterMode(display=False) as counter,
    ):
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        logits = model(**given, logits_to_keep=batch.targets.shape[1]).logits.float().flatten(0, 1)
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, batch.targets.flatten()))
    for parameter in [*model.parameters(), *trained]:  # they stay where they are
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(p.numel() for p in trained), sum(s.nbytes() for s in kept.values()), counter.get_total_flops()
