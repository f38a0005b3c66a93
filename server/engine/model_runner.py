"""One forward pass of a mixed batch through the Hugging Face modules, adapters injected row by row."""

import torch
from torch import Tensor

from crma.errors import UnsupportedModel
from crma.injection import Injection, plan_rows
from server.engine.adapter_pool import AdapterPool
from server.engine.batch import Batch
from server.engine.block_pool import BlockPool
from server.engine.kv_cache import ATTENTION, make_cache

STACK_TOKENS = 64  # up to so many tokens, adapters side by side in one product cost less than one product for each


class ModelRunner:
    """Holds the injected model and the KV cache; `run` is the only thing that touches either.

    Raises:
        UnsupportedModel: the model's attention can't be replaced.
    """

    def __init__(self, injection: Injection, pool: AdapterPool, blocks: BlockPool, num_threads: int = 1) -> None:
        model = injection.model
        if not getattr(model, "_supports_attention_backend", False):
            name = type(model).__name__
            message = f"{name} cannot be served: its attention does not go through transformers' attention interface"
            raise UnsupportedModel(message, field="model", value=name, allowed="_supports_attention_backend")
        self.injection = injection
        self.pool = pool
        self.num_threads = num_threads
        self.kv = make_cache(model, blocks.num_blocks, blocks.block_size)

    @torch.inference_mode()
    def run(self, batch: Batch, new_blocks: list[int]) -> Tensor:
        """fp32 logits of the batch's `logit_rows`: [rows, vocab]."""
        # Every other thread of the server has one, or OpenMP, once its teams outnumber the cores, stops spinning at its
        # barriers, and a step takes twice as long. Here and each time, because MKL's number is the whole process's.
        torch.set_num_threads(self.num_threads)
        self.kv[:, :, new_blocks] = 0
        model, pool = self.injection.model, self.pool
        stack = pool.stack if len(batch.selections) <= STACK_TOKENS else None
        head_rows = torch.tensor(batch.logit_rows, dtype=torch.long, device=model.device)
        plan = plan_rows(batch.selections, pool.loras, pool.backbones, model.device, stack=stack, head_rows=head_rows)
        # Only for the time of a step: outside it the model is what transformers made it.
        before, model.config._attn_implementation = model.config._attn_implementation, ATTENTION
        try:
            with self.injection.active(plan):
                output = model(
                    input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, paged=batch.paged
                )
        finally:
            model.config._attn_implementation = before
        return output.logits[:, -1].float()
