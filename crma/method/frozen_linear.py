"""What an adapter can learn of a linear's output beside a low-rank update, and what that takes.

DoRA (Liu et al. 2024) learns the length of each row of the updated weight: with W the linear's
weight, b its bias and s the scaling,

    y = f (x Wᵀ + s x Aᵀ Bᵀ) + b,    f = magnitude / ||W + s B A||, row by row.

PEFT's `lora_bias` gives B a bias c, scaled as the update is, and its `bias` trains b. Together, of
the linear's own output x Wᵀ + b this is a rescaling, `Affine`, and a low-rank update with f B in
place of B.

Shapes: in and out, the features of the linear; r the rank; A [r, in]; B [out, r].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

_ROWS_AT_ONCE = 1024  # of a weight that is copied to fp32


@dataclass(frozen=True)
class FrozenLinear:
    """A linear of the base model; or its embedding, a linear whose inputs are one-hot.

    Attributes:
        product: x [.., in] in the model's dtype -> x Wᵀ [.., out], without the bias.
        norms: computes `squared_norms`, when an adapter asks for them first.
        bias: [out], or None.
        gain: factor that the module puts on x Wᵀ, as the embeddings of some families do.
    """

    product: Callable[[Tensor], Tensor]
    norms: Callable[[], Tensor]
    bias: Tensor | None = None
    gain: float = 1.0

    @cached_property
    def squared_norms(self) -> Tensor:
        """fp32 [out], of the rows of W."""
        return self.norms()

    @classmethod
    def of(cls, module: nn.Module) -> "FrozenLinear":
        """A linear or an embedding that still has its weights."""
        weight = module.get_parameter("weight").detach()
        if isinstance(module, nn.Embedding):
            gain = torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(weight.dtype)
            return cls.of_embedding(weight, gain.item())
        bias = module.bias if isinstance(module, nn.Linear) else None
        product = partial(nn.functional.linear, weight=weight)
        norms = partial(squared_norms, weight)
        return cls(product, norms, None if bias is None else bias.detach())

    @classmethod
    def of_embedding(cls, weight: Tensor, gain: float = 1.0) -> "FrozenLinear":
        """An embedding of this weight [in, out]."""
        norms = partial(squared_norms, weight.mT)
        return cls(partial(torch.matmul, other=weight), norms, gain=gain)


def squared_norms(weight: Tensor) -> Tensor:
    """fp32 [out]: the squared length of each row of a weight [out, in] of any dtype."""
    norm = partial(torch.linalg.vector_norm, dim=-1, dtype=torch.float32)
    return torch.cat([norm(part) for part in torch.split(weight, _ROWS_AT_ONCE)]).square()


@dataclass(frozen=True)
class LearnedOutput:
    """What an adapter learned of a linear's output, as it is stored.

    Attributes:
        magnitude: fp32 [out], DoRA's; None: the length of the rows is not learned.
        bias: fp32 [out], of B; None: B has none.
        own_bias: fp32 [out], in place of the linear's; None: the linear keeps its own, or has none.
    """

    magnitude: Tensor | None = None
    bias: Tensor | None = None
    own_bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        found = (self.magnitude, self.bias, self.own_bias)
        return [tensor for tensor in found if tensor is not None]

    def to(self, device: torch.device | str) -> "LearnedOutput":
        """A copy in fp32 on `device`."""
        return LearnedOutput(
            *(
                None if tensor is None else tensor.detach().to(device, torch.float32)
                for tensor in (self.magnitude, self.bias, self.own_bias)
            )
        )

    def affine(self, A: Tensor, B: Tensor, scaling: float, linear: FrozenLinear) -> "Affine":
        """The rescaling of the linear's output, its bias included.

        Args:
            A: [r, in] in the model's dtype.
            B: [out, r] likewise.
            scaling: of the update.
            linear: what the adapter is for.
        """
        scale = torch.ones_like(linear.squared_norms)
        if self.magnitude is not None:
            scale = self.magnitude.float() / _updated_norms(A, B, scaling, linear)
        shift = torch.zeros_like(scale)
        if linear.bias is not None:
            old = linear.bias.float()
            new = old if self.own_bias is None else self.own_bias.float()
            shift = new - scale * old
        if self.bias is not None:
            shift = shift + scale * scaling * self.bias.float()
        return Affine(scale, shift)


def _updated_norms(A: Tensor, B: Tensor, scaling: float, linear: FrozenLinear) -> Tensor:
    """fp32 [out]: ||W + s B A|| of each row, as ||W||² + 2 s W·BA + s² ||BA||².

    So it takes no second weight of W's size, and no W that is laid out in rows.
    """
    product = linear.product(A).float()  # [r, out], A Wᵀ
    A, B = A.float(), B.float()
    mixed = (B * product.mT).sum(-1)
    own = (B @ (A @ A.mT) * B).sum(-1)
    squared = linear.squared_norms + 2 * scaling * mixed + scaling**2 * own
    return squared.clamp(min=0).sqrt()


@dataclass(frozen=True)
class Affine:
    """y -> scale · y + shift, column by column; both fp32 [out]."""

    scale: Tensor
    shift: Tensor

    def applied(self, y: Tensor, rows: Tensor | None) -> Tensor:
        """The outputs y [b, .., out] with the rows of an index, or all of them, changed."""
        if rows is None:
            return (y * self.scale + self.shift).to(y.dtype)
        changed = (y[rows] * self.scale + self.shift).to(y.dtype)
        return y.index_copy(0, rows, changed)
