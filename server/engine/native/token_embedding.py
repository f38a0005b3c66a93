"""The embedding of tokens, whose weight may be the head's, packed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from crma.method.frozen_linear import FrozenLinear
from server.engine.native.packed_weight import PackedWeight


@dataclass(frozen=True)
class TokenEmbedding:
    """Rows of a weight [vocab, d].

    Args:
        weight: packed: it is the head's, which the model ties to the embedding.
        dtype: of the rows that it gives.
    """

    weight: Tensor | PackedWeight
    dtype: torch.dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """[T] -> [T, d]."""
        if isinstance(self.weight, PackedWeight):
            return self.weight.rows(ids).to(self.dtype)
        return embedding(ids, self.weight)

    def frozen(self) -> FrozenLinear:
        """The embedding as an adapter needs it."""
        weight = self.weight.unpacked() if isinstance(self.weight, PackedWeight) else self.weight
        return FrozenLinear.of_embedding(weight.to(self.dtype))
