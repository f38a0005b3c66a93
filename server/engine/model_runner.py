"""One forward pass of a mixed batch through the Hugging Face modules, adapters injected row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from crma.injection import Injection, plan_rows
from server.engine.adapter_pool import AdapterPool
from server.engine.batch import Batch
from server.engine.kv_cache import KvCache, attention_mask


class ModelRunner:
    """Holds the injected model and the KV cache; `run` is the only thing that touches either."""

    def __init__(self, injection: Injection, pool: AdapterPool, max_num_seqs: int) -> None:
        self.injection = injection
        self.pool = pool
        self.kv = KvCache(max_num_seqs)
        self.device = next(injection.model.parameters()).device
        config = injection.model.config
        kinds = set(getattr(config, "layer_types", None) or ())
        self._window: int | None = getattr(config, "sliding_window", None)
        # Models that mix full and windowed layers take one mask a kind; with one kind they take the mask itself.
        self._mixed_layers = len(kinds) > 1
        if kinds == {"full_attention"}:
            self._window = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """fp32 logits of every row's newest token: [b, vocab]."""
        view = self.kv.view(batch.slots, batch.positions)
        plan = plan_rows(batch.selections, self.pool.loras, self.pool.backbones, self.device)
        with self.injection.active(plan):
            output = self.injection.model(
                input_ids=batch.input_ids,
                attention_mask=self._masks(batch.positions, view.num_positions),
                position_ids=batch.positions.clamp(min=0),
                cache=view,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()

    @torch.inference_mode()
    def clear(self, slots: list[int]) -> None:
        """Leave nothing of a sequence whose logits are not numbers to the next one of its slot."""
        self.kv.clear(slots)

    def _masks(self, positions: Tensor, num_positions: int) -> Tensor | dict[str, Tensor]:
        windowed = self._as_model_wants(attention_mask(positions, num_positions, self._window))
        if not self._mixed_layers:
            return windowed
        full = self._as_model_wants(attention_mask(positions, num_positions, None))
        return {"full_attention": full, "sliding_attention": windowed}

    def _as_model_wants(self, mask: Tensor) -> Tensor:
        """Bool for SDPA; for the eager attention (soft-capped models), what is added to the scores."""
        model = self.injection.model
        if model.config._attn_implementation != "eager":
            return mask
        return torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
