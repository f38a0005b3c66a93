"""LoRA: one formula, two speeds.

y += scaling · (x Aᵀ) Bᵀ, scaling = alpha / rank (Hu et al. 2021).

Shapes: x [b, s, in] or [rows, in]; A [r, in]; B [out, r]; y [.., out]. b rows of a batch, s positions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crma.core.errors import ConfigError

Groups = Sequence[tuple[Tensor | None, "LoraPair"]]


@dataclass(frozen=True)
class LoraConfig:
    """Rank and alpha of every pair unless a pair says otherwise; target_modules are last names of module paths."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                "a LoRA needs a rank of at least 1", field="rank", value=self.rank, allowed=">= 1"
            )
        if not self.target_modules:
            raise ConfigError(
                "a LoRA needs target modules",
                field="target_modules",
                value=(),
                allowed="module names",
            )

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraPair:
    """The low-rank update of one linear: A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor
    scaling: float

    def delta(self, x: Tensor) -> Tensor:
        """What this pair adds to the linear's output: [.., in] -> [.., out], in x's dtype.

        Weights are cast to x's dtype on the way (they already have it when serving; in training they are fp32 masters).
        """
        return nn.functional.linear(
            nn.functional.linear(x, self.A.to(x.dtype)) * self.scaling, self.B.to(x.dtype)
        )


@dataclass(frozen=True)
class Lora:
    """A task adapter: pairs keyed by module path in the base model (`model.layers.0.self_attn.q_proj`)."""

    config: LoraConfig
    pairs: dict[str, LoraPair]

    def parameters(self) -> list[Tensor]:
        """Every A and B, in the order of the module paths."""
        return [tensor for _, pair in sorted(self.pairs.items()) for tensor in (pair.A, pair.B)]

    def trainable(self) -> "Lora":
        """A copy whose A and B are fp32 parameters to go on training with."""
        return self._copy(lambda tensor: nn.Parameter(tensor.float()))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Lora":
        """A copy with detached weights on `device` in `dtype`."""
        return self._copy(lambda tensor: tensor.to(device, dtype))

    def _copy(self, change: Callable[[Tensor], Tensor]) -> "Lora":
        items = self.pairs.items()
        pairs = {
            path: LoraPair(change(p.A.detach()), change(p.B.detach()), p.scaling)
            for path, p in items
        }
        return Lora(self.config, pairs)


def new_lora(
    config: LoraConfig, shapes: Mapping[str, tuple[int, int]], generator: torch.Generator
) -> Lora:
    """A trainable fp32 LoRA on every module of `shapes` whose last name is a target; B = 0, so it starts as the base.

    A is Kaiming-uniform with a = sqrt(5), as PEFT starts it: uniform in ±1/sqrt(in).

    Args:
        config: rank, alpha, targets.
        shapes: module path -> (out, in), from `injection.linear_shapes`.
        generator: a CPU generator; the same seed gives the same A.

    Raises:
        ConfigError: a target module that matches nothing.
    """
    pairs = {}
    for path in match_targets(config.target_modules, shapes):
        out_features, in_features = shapes[path]
        bound = 1 / math.sqrt(in_features)
        A = nn.Parameter(
            torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
        )
        B = nn.Parameter(torch.zeros(out_features, config.rank))
        pairs[path] = LoraPair(A, B, config.scaling)
    return Lora(config, pairs)


def match_targets(
    target_modules: Iterable[str], shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Module paths whose last name is a target, in model order. ConfigError for a target that matches nothing."""
    names = {path.rsplit(".", 1)[-1] for path in shapes}
    wanted = set(target_modules)
    if missing := sorted(wanted - names):
        message = f"target module {missing[0]!r} matches no linear of the decoder"
        raise ConfigError(message, field="target_modules", value=missing, allowed=sorted(names))
    return [path for path in shapes if path.rsplit(".", 1)[-1] in wanted]


def add_grouped(y: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """y + each group's delta on its own rows, one pair of products per distinct adapter; other rows are untouched.

    Args:
        y: [b, s, out] the linear's output.
        x: [b, s, in] its input.
        groups: (rows, pair); rows is an int64 index into b, or None for all rows. No row is in two groups.

    Returns:
        A new tensor; y itself where there are no groups.
    """
    for rows, pair in groups:
        y = y + pair.delta(x) if rows is None else y.index_add(0, rows, pair.delta(x[rows]))
    return y
