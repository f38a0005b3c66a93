"""An adapter's weights as the engine serves them: checked, on the model's device, in its dtype."""

from dataclasses import replace

import torch
from torch import Tensor

from crma.core.errors import InvalidAdapter
from crma.method.backbone import Backbone, FoldedPair
from crma.method.injection import Injection
from crma.method.lora import Lora

Weights = Lora | list[FoldedPair]
"""A task adapter, or a backbone folded into one pair a layer."""


def prepare(
    adapter: Lora | Backbone, injection: Injection, device: torch.device | None = None
) -> Weights:
    """Check an adapter against the model and convert it for serving.

    Args:
        device: where its weights are to be; None: the model's.

    Raises:
        InvalidAdapter: it does not fit the model, or its weights overflow as they serve: scaled, in
            the model's dtype.
    """
    weights: Weights
    model = injection.model
    device = device or model.device
    if isinstance(adapter, Backbone):
        injection.check_backbone(adapter.config.num_layers, adapter.config.hidden_size)
        weights = adapter.folded(device, model.dtype)
    else:
        injection.check(adapter)
        weights = _laid_out(injection.bind(adapter.to(device, model.dtype)))
    if not all(tensor.isfinite().all() for tensor in tensors_of(weights)):
        limit = torch.finfo(model.dtype).max
        raise InvalidAdapter(
            f"weights overflow in {model.dtype}, the dtype that serves",
            field="weights",
            value="infinite",
            allowed=f"-{limit:.3g} to {limit:.3g}",
        )
    return weights


def _laid_out(lora: Lora) -> Lora:
    """The same LoRA as it serves: scaled, and each column of B contiguous in memory."""
    pairs = {
        path: replace(pair, A=pair.A.contiguous(), B=pair.scaled_b.mT.contiguous().mT, scaling=1.0)
        for path, pair in lora.pairs.items()
    }
    return Lora(lora.config, pairs)


def size_in_bytes(weights: Weights) -> int:
    """Memory that the weights take, in bytes."""
    return sum(tensor.nbytes for tensor in tensors_of(weights))


def tensors_of(weights: Weights) -> list[Tensor]:
    """All tensors of the weights."""
    if isinstance(weights, Lora):
        return weights.parameters()
    return [tensor for pair in weights for tensor in pair]
