"""One forward pass of a mixed batch: through the lean decoder, or the Hugging Face modules where it does not cover
them."""

from dataclasses import replace

import torch
from torch import Tensor

from crma.core.errors import ConfigError, UnsupportedModel
from crma.core.selection import AdapterSelection
from crma.method.injection import Injection, Plan, plan_rows
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.batch import Batch
from server.engine.native.block_pool import BlockPool
from server.engine.native.decoder import COVERED, Decoder, covers
from server.engine.native.kernel import Kernel
from server.engine.native.kv_cache import ATTENTION, make_cache
from server.engine.native.lora_stack import StackedRows


class ModelRunner:
    """Holds the injected model and the KV cache; `run` is the only thing that touches either.

    Args:
        take_weights, kernel, int8: as in `Decoder`.

    Raises:
        UnsupportedModel: the model's attention can't be replaced.
        ConfigError: int8 without a kernel or the decoder.
    """

    def __init__(
        self,
        injection: Injection,
        pool: AdapterPool,
        blocks: BlockPool,
        num_threads: int = 1,
        *,
        take_weights: bool = False,
        kernel: Kernel | None = None,
        int8: bool = False,
    ) -> None:
        model = injection.model
        if not getattr(model, "_supports_attention_backend", False):
            name = type(model).__name__
            message = f"{name} cannot be served: its attention does not go through transformers' attention interface"
            raise UnsupportedModel(
                message, field="model", value=name, allowed="_supports_attention_backend"
            )
        self.injection = injection
        self.pool = pool
        self.num_threads = num_threads
        self.kernel = kernel
        self.decoder = (
            Decoder(model, take_weights=take_weights, kernel=kernel, int8=int8)
            if covers(model)
            else None
        )
        if int8 and (kernel is None or self.decoder is None):
            name = type(model).__name__
            allowed = f"a CPU with the native kernel, and one of {', '.join(sorted(COVERED))}"
            raise ConfigError(
                "int8 cannot be had", field="quantization", value=name, allowed=allowed
            )
        self.sites = self.decoder.sites if self.decoder else [(path,) for path in injection.shapes]
        self.kv = make_cache(model, blocks.num_blocks, blocks.block_size)

    @torch.inference_mode()
    def run(self, batch: Batch, new_blocks: list[int]) -> Tensor:
        """fp32 logits of the batch's `logit_rows`: [rows, vocab]."""
        # Every other thread of the server has one, or OpenMP, once its teams outnumber the cores, stops spinning at its
        # barriers, and a step takes twice as long. Here and each time, because MKL's number is the whole process's.
        torch.set_num_threads(self.num_threads)
        self.kv[:, new_blocks] = 0
        plan, paged = self._plan(batch), replace(batch.paged, kernel=self.kernel)
        if self.decoder is not None:
            return self.decoder.forward(batch.input_ids, batch.positions, paged, plan).float()
        ids, positions, model = (
            batch.input_ids[:, None],
            batch.positions[:, None],
            self.injection.model,
        )
        # Only for the time of a step: outside it the model is what transformers made it.
        before, model.config._attn_implementation = model.config._attn_implementation, ATTENTION
        try:
            with self.injection.active(plan):
                output = model(input_ids=ids, position_ids=positions, use_cache=False, paged=paged)
        finally:
            model.config._attn_implementation = before
        return output.logits[:, -1].float()

    def _plan(self, batch: Batch) -> Plan:
        crma = [AdapterSelection(None, selection.crma_digest) for selection in batch.selections]
        plan = plan_rows(crma, {}, self.pool.backbones, self.kv.device)
        tasks = [selection.task_digest for selection in batch.selections]
        stacked = None
        if digests := {digest for digest in tasks if digest is not None}:
            stacked = StackedRows(
                self.pool.stack(digests, self.sites), tasks, batch.num_single, self.kernel
            )
        return replace(plan, stacked=stacked, head_rows=batch.logit_rows)
