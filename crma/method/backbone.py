"""The CRMA backbone: one adapter on the residual stream after every decoder block.

T(h) = h + g Ŵ (M ⊗ I_k) R̂ h,  M = DS(S),  g = sigmoid(gamma)

Shapes: L layers (decoder blocks); d hidden size; n streams of rank k, stored stream by stream;
nk = n·k; h [.., d]; S [L, n, n]; R [L, nk, d]; W [L, d, nk]; gamma [L]. The parameters of all
layers are stacked, so that a training step derives all of its factors in a few batched operations.

The claims are those of "CRMA: A Spectrally-Bounded Backbone for Modular Continual Fine-Tuning of
LLMs" (arXiv 2606.00382). The equations are ours, from the literature on doubly stochastic mixing:
see docs/method.md, section 2.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from crma.core.errors import ConfigError, InvalidAdapter
from crma.core.json_lines import checked
from crma.method.device_copy import to_device
from crma.method.sinkhorn import MixingMap, doubly_stochastic


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CrmaConfig:
    """The shape of a backbone and of its map. It is stored with the weights and in their digest."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_streams: int = Field(default=4, gt=0)
    stream_rank: int = Field(default=4, gt=0)
    iterations: int = Field(default=20, gt=0, le=1000)
    cap: float = Field(default=6.0, gt=0, le=60)
    mapping: MixingMap = "rounded"

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if self.rank > self.hidden_size:
            raise ValueError(
                f"num_streams * stream_rank must not exceed hidden_size = {self.hidden_size}"
            )
        return self

    @property
    def rank(self) -> int:
        """nk, the rank of the folded update."""
        return self.num_streams * self.stream_rank

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CrmaConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a key is unknown or missing, or its value is not valid; the error names it.
        """
        return checked("", dict(values), TypeAdapter(cls).validate_python, ConfigError)


class Factors(NamedTuple):
    """The factors of all layers in the formula: R̂, M, Ŵ and g. R̂ and Ŵ have norms of at most 1."""

    R: Tensor  # [L, nk, d]
    M: Tensor  # [L, n, n]
    W: Tensor  # [L, d, nk]
    g: Tensor  # [L]


class FoldedPair(NamedTuple):
    """One layer as a low-rank update: T(h) - h = B (A h)."""

    A: Tensor  # [nk, d]
    B: Tensor  # [d, nk]; each column is contiguous in memory

    def delta(self, h: Tensor) -> Tensor:
        """T(h) - h: [.., d] -> [.., d]. h must have the dtype of A and B."""
        return nn.functional.linear(nn.functional.linear(h, self.A), self.B)


class Backbone(nn.Module):
    """The raw fp32 parameters of all layers, and the factors derived from them.

    A new backbone is the identity, because W starts at 0.

    The config's `mapping` selects the method or a control (docs/method.md, section 3):

    - "rounded": the method; "sinkhorn": the same without the rounding.
    - "identity": M = I.
    - "free": M is S itself, learned without Sinkhorn from the same starting point.
    - "unbounded": M = I, g = 1 and R, W unbounded: a plain low-rank adapter on the residual stream.

    Args:
        config: the shape.
        generator: a CPU generator; the same seed gives the same parameters. None: torch's own.
    """

    def __init__(self, config: CrmaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        L, n, rank, d = config.num_layers, config.num_streams, config.rank, config.hidden_size
        near_identity = torch.full((n, n), -3.0).fill_diagonal_(0.0)
        self.S = nn.Parameter(near_identity + 0.01 * torch.randn(L, n, n, generator=generator))
        if config.mapping == "free":
            self.S.data = doubly_stochastic(
                self.S.data, iterations=config.iterations, cap=config.cap
            )
        orthonormal, _ = torch.linalg.qr(torch.randn(L, d, rank, generator=generator))
        self.R = nn.Parameter(orthonormal.mT.contiguous())
        self.W = nn.Parameter(torch.zeros(L, d, rank))
        self.gamma = nn.Parameter(torch.zeros(L))

    def mixing(self) -> Tensor:
        """M = DS(S), or the matrix that a control uses instead: [L, n, n] float32."""
        config = self.config
        if config.mapping == "free":
            return self.S
        if config.mapping in ("identity", "unbounded"):
            return torch.eye(config.num_streams, device=self.S.device).expand_as(self.S)
        return doubly_stochastic(
            self.S, iterations=config.iterations, cap=config.cap, mapping=config.mapping
        )

    def factors(self) -> Factors:
        """The factors of the formula, differentiable in all four parameters."""
        if self.config.mapping == "unbounded":
            return Factors(R=self.R, M=self.mixing(), W=self.W, g=torch.ones_like(self.gamma))
        return Factors(
            R=bounded(self.R), M=self.mixing(), W=bounded(self.W), g=torch.sigmoid(self.gamma)
        )

    def fold(self) -> tuple[Tensor, Tensor]:
        """The folded form, T(h) - h = B (A h), of all layers.

        Returns:
            A = R̂ [L, nk, d] and B = g Ŵ (M ⊗ I_k) [L, d, nk]: fp32, differentiable.
        """
        n, k = self.config.num_streams, self.config.stream_rank
        R, M, W, g = self.factors()
        # Column (j, b) of W (M ⊗ I_k) is the sum over streams i of W[:, (i, b)] M[i, j].
        streams = W.reshape(*W.shape[:2], n, k)
        mixed = torch.einsum("ldib,lij->ldjb", streams, M).flatten(-2)
        return R, g[:, None, None] * mixed

    def folded(self, device: torch.device | str, dtype: torch.dtype) -> list[FoldedPair]:
        """The pairs to serve, one for each layer, detached, on `device` in `dtype`."""
        with torch.no_grad():
            A, B = self.fold()
        columns = to_device(B, device, dtype).mT.contiguous()
        rows = to_device(A, device, dtype)
        return [FoldedPair(a, b.mT) for a, b in zip(rows, columns, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the raw fp32 parameters, as they are stored.

        Blending and further training start from these, never from folded factors.
        """
        return {
            name: parameter.detach().clone().contiguous()
            for name, parameter in self.named_parameters()
        }

    @classmethod
    def from_tensors(cls, config: CrmaConfig, tensors: Mapping[str, Tensor]) -> "Backbone":
        """The inverse of `tensors`.

        Raises:
            InvalidAdapter: a tensor is missing, unknown, not finite, or of a wrong shape or dtype;
                or the folded pairs overflow in bfloat16, the narrowest dtype that serves.
        """
        backbone = cls(config, torch.Generator().manual_seed(0))
        expected = _kinds(backbone.state_dict())
        found = _kinds(tensors)
        for name in sorted({*expected, *found}):
            if found.get(name) != expected.get(name):
                message = f"{name}: a CRMA tensor is missing, unknown, or of a wrong shape or dtype"
                raise InvalidAdapter(message, field=name, value=found, allowed=expected)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                message = f"{name}: the CRMA tensor holds NaN or infinity"
                raise InvalidAdapter(message, field=name, value="not finite", allowed="finite")
        backbone.load_state_dict(dict(tensors))
        for layer, pair in enumerate(backbone.folded("cpu", torch.bfloat16)):
            if not all(factor.isfinite().all() for factor in pair):
                message = f"layer {layer}: the CRMA weights overflow as they are served: folded"
                raise InvalidAdapter(message, field="W", value="infinite", allowed="finite")
        return backbone


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> shape and dtype."""
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def bounded(P: Tensor) -> Tensor:
    """P / sqrt(max(1, λ_max(P Pᵀ))): the spectral norm becomes at most 1; a smaller one is kept.

    λ_max is computed from the Gram matrix of P / max(1, largest |entry|), on P's shorter side:
    squares of large finite entries would overflow. The clamp is inside the root, because outside
    it the gradient at P = 0 is NaN.

    Args:
        P: [L, nk, d] or [L, d, nk].

    Returns:
        P's shape; never under autocast.
    """
    with torch.autocast(P.device.type, enabled=False):
        scale = P.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1.0)
        P = P / scale
        gram = P @ P.mT if P.shape[-2] <= P.shape[-1] else P.mT @ P
        largest = torch.linalg.eigvalsh(gram)[..., -1, None, None]
        return P / largest.clamp(min=scale**-2).sqrt()


def apply_unfolded(h: Tensor, factors: Factors, layer: int) -> Tensor:
    """T(h) of one layer, written exactly as the formula; tests compare the folded form with it.

    Args:
        h: [.., d], in the dtype of the factors.
        factors: of all layers.
        layer: from 0.
    """
    R, M, W, g = (factor[layer] for factor in factors)
    k = R.shape[0] // M.shape[0]
    mixing = torch.kron(M, torch.eye(k, dtype=M.dtype, device=M.device))
    return h + g * (h @ R.mT @ mixing.mT @ W.mT)
