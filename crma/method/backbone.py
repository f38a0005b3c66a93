"""The CRMA backbone: one adapter on the residual stream after every decoder block.

T(h) = h + g Ŵ (M ⊗ I_k) R̂ h,  M = DS(S),  g = sigmoid(gamma)

Shapes: L layers (decoder blocks); d hidden size; n streams of rank k, stream-major, nk = n·k;
h [.., d]; S [L, n, n]; R [L, nk, d]; W [L, d, nk]; gamma [L]. All layers live in four stacked parameters,
because everything a step needs of them is then a handful of batched operations.

The claims are those of "CRMA: A Spectrally-Bounded Backbone for Modular Continual Fine-Tuning of LLMs"
(arXiv 2606.00382); the equations are ours, from the literature on doubly stochastic mixing (ARCHITECTURE.md).
"""

from collections.abc import Mapping as MappingABC
from dataclasses import asdict
from typing import Any, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from crma.core.errors import ConfigError, InvalidAdapter
from crma.core.json_lines import checked
from crma.method.sinkhorn import Mapping, doubly_stochastic


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CrmaConfig:
    """The shape of a backbone and of its map; frozen with the weights (it is part of the digest)."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_streams: int = Field(default=4, gt=0)
    stream_rank: int = Field(default=4, gt=0)
    iterations: int = Field(default=20, gt=0, le=1000)
    cap: float = Field(default=6.0, gt=0, le=60)
    mapping: Mapping = "rounded"

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if self.rank > self.hidden_size:
            raise ValueError(
                f"streams x stream rank cannot exceed the hidden size, {self.hidden_size}"
            )
        return self

    @property
    def rank(self) -> int:
        """nk, the rank of the folded update."""
        return self.num_streams * self.stream_rank

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: MappingABC[str, Any]) -> "CrmaConfig":
        """Raises ConfigError that names a wrong, unknown or missing key."""
        return checked("", dict(values), TypeAdapter(cls).validate_python, ConfigError)


class Factors(NamedTuple):
    """The bounded factors of all layers: R [L, nk, d] and W [L, d, nk] with norms <= 1, M [L, n, n], g [L]."""

    R: Tensor
    M: Tensor
    W: Tensor
    g: Tensor


class FoldedPair(NamedTuple):
    """T(h) - h = B (A h) of one layer: A [nk, d], B [d, nk], whose columns lie together in memory."""

    A: Tensor
    B: Tensor

    def delta(self, h: Tensor) -> Tensor:
        """[.., d] -> [.., d], in h's dtype."""
        return nn.functional.linear(nn.functional.linear(h, self.A), self.B)


class Backbone(nn.Module):
    """The raw fp32 parameters of all layers, and what follows from them. Identity at step 0 because W starts at 0.

    `mapping` "rounded" is the method, "sinkhorn" its plain form. The controls of METHOD, section 3: "identity" (M = I),
    "free" (M is S itself, from the same start, without Sinkhorn), "unbounded" (M = I, g = 1, R and W as they are: a
    low-rank adapter on the residual stream).
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
        self.R = nn.Parameter(
            torch.linalg.qr(torch.randn(L, d, rank, generator=generator))[0].mT.contiguous()
        )
        self.W = nn.Parameter(torch.zeros(L, d, rank))
        self.gamma = nn.Parameter(torch.zeros(L))

    def mixing(self) -> Tensor:
        """M = DS(S), or what the control has in its place: [L, n, n] float32."""
        c = self.config
        if c.mapping == "free":
            return self.S
        if c.mapping in ("identity", "unbounded"):
            return torch.eye(c.num_streams, device=self.S.device).expand_as(self.S)
        return doubly_stochastic(self.S, iterations=c.iterations, cap=c.cap, mapping=c.mapping)

    def factors(self) -> Factors:
        """The bounded factors, differentiable in all four parameters."""
        if self.config.mapping == "unbounded":
            return Factors(R=self.R, M=self.mixing(), W=self.W, g=torch.ones_like(self.gamma))
        return Factors(
            R=bounded(self.R), M=self.mixing(), W=bounded(self.W), g=torch.sigmoid(self.gamma)
        )

    def fold(self) -> tuple[Tensor, Tensor]:
        """A = R̂ [L, nk, d] and B = g Ŵ (M ⊗ I_k) [L, d, nk], fp32, differentiable: T(h) - h = B (A h)."""
        n, k = self.config.num_streams, self.config.stream_rank
        R, M, W, g = self.factors()
        # Column (j, b) of W (M ⊗ I_k) is the sum over streams i of W[:, (i, b)] M[i, j].
        streams = W.reshape(*W.shape[:2], n, k)
        mixed = torch.einsum("ldib,lij->ldjb", streams, M).flatten(-2)
        return R, g[:, None, None] * mixed

    def folded(self, device: torch.device | str, dtype: torch.dtype) -> list[FoldedPair]:
        """One detached pair a layer as served, on `device` in `dtype`."""
        with torch.no_grad():
            A, B = self.fold()
        columns = B.to(device, dtype).mT.contiguous()
        return [FoldedPair(a, b.mT) for a, b in zip(A.to(device, dtype), columns, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """The raw fp32 parameters as stored: a later blend or training starts from these, never from folded factors."""
        return {
            name: parameter.detach().clone().contiguous()
            for name, parameter in self.named_parameters()
        }

    @classmethod
    def from_tensors(cls, config: CrmaConfig, tensors: MappingABC[str, Tensor]) -> "Backbone":
        """The inverse of `tensors`. Raises InvalidAdapter for a missing, unknown, misshapen or non-finite tensor."""
        backbone = cls(config, torch.Generator().manual_seed(0))
        expected, found = _kinds(backbone.state_dict()), _kinds(tensors)
        if odd := sorted(
            name for name in {*expected, *found} if found.get(name) != expected.get(name)
        ):
            message = "missing or unknown CRMA tensor, or one of another kind"
            raise InvalidAdapter(message, field=odd[0], value=found, allowed=expected)
        if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            message = "CRMA tensor holds NaN or infinity"
            raise InvalidAdapter(message, field=odd[0], value="not finite", allowed="finite")
        backbone.load_state_dict(dict(tensors))
        return backbone


def _kinds(tensors: MappingABC[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def bounded(P: Tensor) -> Tensor:
    """P / sqrt(max(1, λ_max(P Pᵀ))): spectral norm at most 1, unchanged where it already is.

    λ_max comes from the small Gram matrix, of P / max(1, its largest entry): squares of finite entries overflow.
    The clamp is inside the root: outside it the gradient at P = 0 is NaN.

    Args:
        P: [L, nk, d] or [L, d, nk]; the Gram is taken over the longer side.
    """
    with torch.autocast(P.device.type, enabled=False):
        scale = P.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1.0)
        P = P / scale
        gram = P @ P.mT if P.shape[-2] <= P.shape[-1] else P.mT @ P
        largest = torch.linalg.eigvalsh(gram)[..., -1, None, None]
        return P / largest.clamp(min=scale**-2).sqrt()


def apply_unfolded(h: Tensor, factors: Factors, layer: int) -> Tensor:
    """T(h) of one layer, literally as the formula reads: the reference that the folded form is tested against."""
    R, M, W, g = (factor[layer] for factor in factors)
    k = R.shape[0] // M.shape[0]
    mixing = torch.kron(M, torch.eye(k, dtype=M.dtype, device=M.device))
    return h + g * (h @ R.mT @ mixing.mT @ W.mT)
