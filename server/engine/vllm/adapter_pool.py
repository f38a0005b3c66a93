"""Adapters in the memory of the server's process, from which vLLM's folders are written."""

import torch

from crma.core.errors import InvalidAdapter
from crma.method.backbone import Backbone
from crma.method.injection import Injection
from crma.method.lora import Lora
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.adapter_weights import Weights, prepare

ADVICE = "CRMA_ENGINE=native serves it"


class HostAdapterPool(AdapterPool):
    """The pool of the native engine, on the CPU and without the model's weights.

    Args:
        injection: on a model without weights (`load_skeleton`).
        max_resident: as in `AdapterPool`.
        max_bytes: likewise.
        max_rank: largest rank that vLLM has room for.
    """

    def __init__(
        self, injection: Injection, max_resident: int, max_bytes: int | None, max_rank: int
    ) -> None:
        super().__init__(injection, max_resident, max_bytes)
        self.max_rank = max_rank

    def prepared(self, adapter: Lora | Backbone) -> Weights:
        """Check an adapter and convert it, for `write_folder`.

        Raises:
            InvalidAdapter: as `prepare`; or vLLM cannot serve it.
        """
        if isinstance(adapter, Backbone):
            self._check_rank("backbone", adapter.config.rank)
        else:
            self._check_kind(adapter)
        return prepare(adapter, self.injection, torch.device("cpu"))

    def _check_kind(self, lora: Lora) -> None:
        """Raises InvalidAdapter for what is no plain LoRA on linears of the blocks."""
        for path, pair in lora.pairs.items():
            self._check_rank(path, pair.A.shape[0])
            if path in self.injection.embedding or path in self.injection.head:
                message = f"{path}: vLLM adapts linears of the blocks only; {ADVICE}"
                raise InvalidAdapter(message, field=path, value=path, allowed="linears of blocks")
            if pair.output is not None:
                message = f"{path}: vLLM does not serve DoRA, nor biases of an adapter; {ADVICE}"
                raise InvalidAdapter(message, field=path, value="DoRA or bias", allowed="A, B")

    def _check_rank(self, path: str, rank: int) -> None:
        if rank > self.max_rank:
            message = f"{path}: the adapter has rank {rank}, and CRMA_MAX_LORA_RANK={self.max_rank}"
            raise InvalidAdapter(message, field=path, value=rank, allowed=f"<= {self.max_rank}")
