"""LoRA: the low-rank update of a linear layer, and a task adapter made of such updates.

y += scaling · (x Aᵀ) Bᵀ, scaling = alpha / rank (Hu et al. 2021).

Shapes: b rows of a batch; s positions; in and out, the features of the linear; r the rank;
x [b, s, in]; A [r, in]; B [out, r]; y [b, s, out].
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from crma.core.errors import ConfigError
from crma.method.device_copy import to_device
from crma.method.frozen_linear import Affine, FrozenLinear, LearnedOutput


class LowRankUpdate(Protocol):
    """An update that is added to an output: a `LoraPair`, or a backbone's `FoldedPair`."""

    def delta(self, x: Tensor, /) -> Tensor:
        """The update for inputs x [.., in]: [.., out]."""


Groups = Sequence[tuple[Tensor | None, LowRankUpdate]]
"""(rows, update): rows is an int64 index into the batch, or None for all rows."""


@dataclass(frozen=True)
class LoraConfig:
    """The rank and alpha of a LoRA, and the modules that it adapts.

    Args:
        rank: of every pair; a stored adapter may override it for single modules.
        alpha: of every pair, likewise.
        target_modules: the last names of module paths, such as "q_proj".

    Raises:
        ConfigError: the rank is below 1, or there are no target modules.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            message = "rank: a LoRA needs a rank of at least 1"
            raise ConfigError(message, field="rank", value=self.rank, allowed=">= 1")
        if not self.target_modules:
            message = "target_modules: a LoRA needs at least one target module"
            raise ConfigError(message, field="target_modules", value=(), allowed="module names")

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraPair:
    """The low-rank update of one linear: A [r, in], B [out, r].

    Attributes:
        is_embedding: the linear is the model's embedding: its inputs are token ids, and it gives
            the rows of Aᵀ.
        output: what else changes in the linear's output: as learned, or, once `bound` to the
            linear, as computed. None: nothing, and there is no need to bind the pair. The pair of
            an embedding must be bound, because some families multiply what theirs gives.
    """

    A: Tensor
    B: Tensor
    scaling: float
    is_embedding: bool = False
    output: LearnedOutput | Affine | None = None

    def delta(self, x: Tensor) -> Tensor:
        """The update of the linear's output for inputs x: [.., in] -> [.., out], in x's dtype.

        A and B are cast to x's dtype. When serving they already have it; in training they are fp32.
        For an embedding x is token ids [..], and the update has the dtype of A.
        """
        if self.is_embedding:
            low_rank = nn.functional.embedding(x, self.A.mT)
            return nn.functional.linear(low_rank * self.scaling, self.B)
        low_rank = nn.functional.linear(x, self.A.to(x.dtype))
        return nn.functional.linear(low_rank * self.scaling, self.B.to(x.dtype))

    def bound(self, find: Callable[[], FrozenLinear]) -> "LoraPair":
        """The pair with what was learned of the output as a rescaling, and B multiplied by it.

        Args:
            find: returns the linear; called only if there is something to compute.
        """
        if not isinstance(self.output, LearnedOutput):
            return self
        linear = find()
        affine = self.output.affine(self.A, self.B, self.scaling, linear)
        B = (self.B * affine.scale[:, None]).to(self.B.dtype)
        return replace(self, B=B, scaling=self.scaling * linear.gain, output=affine)

    @property
    def scaled_b(self) -> Tensor:
        """scaling · B, [out, r], which serves; it can overflow where B does not."""
        return self.B * self.scaling

    def tensors(self) -> list[Tensor]:
        """A, B and those of the output."""
        if isinstance(self.output, LearnedOutput):
            return [self.A, self.B, *self.output.tensors()]
        if isinstance(self.output, Affine):
            return [self.A, self.B, self.output.scale, self.output.shift]
        return [self.A, self.B]


@dataclass(frozen=True)
class Lora:
    """A task adapter: a pair for each adapted linear of the base model.

    The keys of `pairs` are module paths, such as `model.layers.0.self_attn.q_proj`.
    """

    config: LoraConfig
    pairs: dict[str, LoraPair]

    def parameters(self) -> list[Tensor]:
        """The tensors of every pair, in the order of the module paths."""
        return [tensor for _, pair in sorted(self.pairs.items()) for tensor in pair.tensors()]

    def trainable(self) -> "Lora":
        """A copy whose A and B are fp32 parameters, for further training."""
        return self._copy(lambda tensor: nn.Parameter(tensor.float()))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Lora":
        """A copy with detached weights on `device` in `dtype`.

        What it learned of outputs stays fp32.
        """
        return self._copy(lambda tensor: to_device(tensor, device, dtype))

    def _copy(self, change: Callable[[Tensor], Tensor]) -> "Lora":
        pairs = {}
        for path, pair in self.pairs.items():
            A = change(pair.A.detach())
            B = change(pair.B.detach())
            output = pair.output
            if isinstance(output, LearnedOutput):
                output = output.to(A.device)
            pairs[path] = replace(pair, A=A, B=B, output=output)
        return Lora(self.config, pairs)


def new_lora(
    config: LoraConfig,
    shapes: Mapping[str, tuple[int, int]],
    generator: torch.Generator,
    drawn_rank: int = 0,
) -> Lora:
    """A trainable fp32 LoRA that adds nothing yet: B = 0, and A is initialised as in PEFT.

    A is Kaiming-uniform with a = sqrt(5), that is, uniform in ±1/sqrt(in).

    Args:
        config: the rank, alpha and targets.
        shapes: module path -> (out, in), from `injection.linear_shapes`.
        generator: a CPU generator; the same seed gives the same A.
        drawn_rank: A is drawn at this rank, and its first rows are taken, so that LoRAs of
            different ranks begin with the same rows; 0: at the rank of the config.

    Raises:
        ConfigError: a target matches no module, or `drawn_rank` is below the rank.
    """
    drawn = drawn_rank or config.rank
    if drawn < config.rank:
        message = "drawn_rank: A cannot be cut from a draw of a smaller rank"
        raise ConfigError(
            message, field="lora.drawn_rank", value=drawn_rank, allowed=f"0, or >= {config.rank}"
        )
    pairs = {}
    for path in match_targets(config.target_modules, shapes):
        out_features, in_features = shapes[path]
        bound = 1 / math.sqrt(in_features)
        A = torch.empty(drawn, in_features).uniform_(-bound, bound, generator=generator)
        A = A[: config.rank].clone()
        B = torch.zeros(out_features, config.rank)
        pairs[path] = LoraPair(nn.Parameter(A), nn.Parameter(B), config.scaling)
    return Lora(config, pairs)


def match_targets(
    target_modules: Iterable[str], shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """The module paths whose last name is a target, in model order.

    Args:
        target_modules: last names of module paths.
        shapes: module path -> (out, in), in model order.

    Raises:
        ConfigError: a target matches no module.
    """
    names = {_last_name(path) for path in shapes}
    wanted = set(target_modules)
    missing = sorted(wanted - names)
    if missing:
        message = f"target module {missing[0]!r} matches no linear of the decoder"
        raise ConfigError(message, field="target_modules", value=missing, allowed=sorted(names))
    return [path for path in shapes if _last_name(path) in wanted]


def _last_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def add_grouped(y: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """Add to the rows of each group their update; rows in no group stay as they are.

    Args:
        y: [b, s, out] the output to add to.
        x: [b, s, in] the input of the updates.
        groups: no row may be in two of them.

    Returns:
        A new tensor, or y itself if there are no groups.
    """
    for rows, update in groups:
        y = y + update.delta(x) if rows is None else y.index_add(0, rows, update.delta(x[rows]))
    return y
