"""One forward pass of a mixed batch.

It goes through the lean decoder, or through the Hugging Face modules of a model that the decoder
does not cover.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from crma.core.errors import ConfigError, UnsupportedModel
from crma.core.selection import AdapterSelection
from crma.method.injection import Injection, Plan, RowDeltas, plan_rows
from crma.models.rope import RopeScaling
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.batch import Batch
from server.engine.native.block_pool import BlockPool
from server.engine.native.decoder import COVERED, Decoder, covers
from server.engine.native.kernel import Kernel
from server.engine.native.kv_cache import PagedKv, make_cache
from server.engine.native.lora_stack import LoraStack, StackedRows
from server.engine.native.lora_table import LoraRows, LoraTables
from server.engine.native.rotary import ScaledRotary
from server.engine.native.tiled_attention import can_attend_in_tiles


class ModelRunner:
    """Owns the model and the KV cache; nothing but `run` touches either.

    Args:
        injection: the model with its hooks.
        pool: holds the adapters of every batch that is run.
        blocks: says how many blocks the KV cache has, and of what size.
        num_threads: CPU threads for a step.
        take_weights: as in `Decoder`.
        kernel: as in `Decoder`.
        int8: as in `Decoder`.
        rope: how the frequencies depend on a sequence's length; None: they do not.

    Raises:
        UnsupportedModel: the model's attention or its rotary embedding cannot be replaced.
        ConfigError: int8 without the kernel or the decoder.
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
        rope: RopeScaling | None = None,
    ) -> None:
        model = injection.model
        name = type(model).__name__
        if not covers(model) and not getattr(model, "_supports_attention_backend", False):
            message = (
                f"{name} cannot be served: "
                "its attention does not go through transformers' attention interface"
            )
            raise UnsupportedModel(
                message, field="model", value=name, allowed="_supports_attention_backend"
            )
        self.injection = injection
        self.pool = pool
        self.num_threads = num_threads
        self.kernel = kernel
        self.rotary = None if rope is None else ScaledRotary(model, rope)
        self.decoder: Decoder | None = None
        if covers(model):
            self.decoder = Decoder(
                model, take_weights=take_weights, kernel=kernel, int8=int8, rotary=self.rotary
            )
        if int8 and (kernel is None or self.decoder is None):
            allowed = f"a CPU with the native kernel, and one of {', '.join(sorted(COVERED))}"
            raise ConfigError(
                "int8 needs the native kernel and a model that the decoder covers",
                field="quantization",
                value=name,
                allowed=allowed,
            )
        if self.decoder is not None:
            self.sites = self.decoder.sites
            injection.frozen = self.decoder.frozen
        else:
            self.sites = [(path,) for path in injection.all_shapes]
        self._tables = LoraTables(self.sites, injection.all_shapes)
        self._stack = LoraStack(self.sites, injection.all_shapes)
        self.kv = make_cache(model, blocks.num_blocks, blocks.block_size)
        num_heads = model.config.num_attention_heads
        self.in_tiles = can_attend_in_tiles(self.kv, num_heads, num_threads)

    @torch.inference_mode()
    def run(self, batch: Batch, new_blocks: list[int]) -> Tensor:
        """Compute a batch, whose tokens' keys and values go to the cache.

        Args:
            batch: every adapter that it selects is resident.
            new_blocks: blocks that hold nothing of a sequence yet; where torch attends, they are
                zeroed.

        Returns:
            fp32 logits [rows, vocab] of the batch's `logit_rows`.
        """
        # Every other thread of the server computes alone: once OpenMP's threads outnumber the
        # cores, they no longer spin at barriers, and a step takes twice as long. Set the number in
        # every step, because MKL has one number for the whole process.
        torch.set_num_threads(self.num_threads)
        if self.kernel is None and new_blocks:
            self.kv[:, new_blocks] = 0
        plan = self._plan(batch)
        if self.rotary is not None:
            self.rotary.set_rows(batch.chunks)
        paged = replace(batch.paged, kernel=self.kernel)
        if self.decoder is not None:
            logits = self.decoder.forward(
                batch.input_ids, batch.positions, batch.num_positions, paged, plan
            )
            return logits.float()
        return self._run_modules(batch, paged, plan).float()

    def _run_modules(self, batch: Batch, paged: PagedKv, plan: Plan) -> Tensor:
        """Run the Hugging Face model, with every token a sequence of its own."""
        rotary = nullcontext() if self.rotary is None else self.rotary.in_place()
        with self._paged_attention(), rotary, self.injection.active(plan):
            output = self.injection.model(
                input_ids=batch.input_ids[:, None],
                position_ids=batch.positions[:, None],
                use_cache=False,
                paged=paged,
            )
        return output.logits[:, -1]

    @contextmanager
    def _paged_attention(self) -> Iterator[None]:
        """Replace the model's attention for one step; between steps the model has its own."""
        from server.engine.native.module_attention import ATTENTION  # the decoder needs no modules

        config = self.injection.model.config
        original = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = original

    def _plan(self, batch: Batch) -> Plan:
        """Say which rows use which backbone and LoRA, and whose logits are needed."""
        crma = [AdapterSelection(None, selection.crma_digest) for selection in batch.selections]
        plan = plan_rows(crma, {}, self.pool.backbones, self.kv.device)
        tasks = [selection.task_digest for selection in batch.selections]
        used = {digest for digest in tasks if digest is not None}
        if not used:
            return replace(plan, head_rows=batch.logit_rows)
        if self.kernel is None:
            self._stack.hold({d: self.pool.loras[d] for d in sorted(used)})
        head = None
        if self._adapts_head(used):
            rows = range(len(tasks)) if batch.logit_rows is None else batch.logit_rows.tolist()
            head = self._row_deltas([tasks[row] for row in rows])
        stacked = self._row_deltas(tasks)
        return replace(plan, stacked=stacked, head_rows=batch.logit_rows, stacked_head=head)

    def _adapts_head(self, used: Iterable[str]) -> bool:
        """Whether one of these adapters has a pair on the head."""
        loras = (self.pool.loras[digest] for digest in used)
        return any(not lora.pairs.keys().isdisjoint(self.injection.head) for lora in loras)

    def _row_deltas(self, tasks: Sequence[str | None]) -> RowDeltas:
        """The adapters of rows."""
        if self.kernel is not None:
            return LoraRows(self._tables, self.pool.loras, tasks, self.kernel)
        return StackedRows(self._stack, tasks, self.kv.device)
