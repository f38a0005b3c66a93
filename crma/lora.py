"""LoRA: one formula, two speeds.

y += scaling · (x Aᵀ) Bᵀ, scaling = alpha / rank (Hu et al. 2021).

Shapes: x [b, s, in] or [rows, in]; A [r, in]; B [out, r]; y [.., out]. b rows of a batch, s positions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn

from crma.errors import ConfigError
from crma.kernel import Kernel

Groups = Sequence[tuple[Tensor | None, "LoraPair"]]


@dataclass(frozen=True)
class LoraConfig:
    """Rank and alpha of every pair unless a pair says otherwise; target_modules are last names of module paths."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError("a LoRA needs a rank of at least 1", field="rank", value=self.rank, allowed=">= 1")
        if not self.target_modules:
            raise ConfigError("a LoRA needs target modules", field="target_modules", value=(), allowed="module names")

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
        return nn.functional.linear(nn.functional.linear(x, self.A.to(x.dtype)) * self.scaling, self.B.to(x.dtype))


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
        pairs = {path: LoraPair(change(p.A.detach()), change(p.B.detach()), p.scaling) for path, p in items}
        return Lora(self.config, pairs)


def new_lora(config: LoraConfig, shapes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> Lora:
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
        A = nn.Parameter(torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator))
        B = nn.Parameter(torch.zeros(out_features, config.rank))
        pairs[path] = LoraPair(A, B, config.scaling)
    return Lora(config, pairs)


def match_targets(target_modules: Iterable[str], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
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


MAX_MIXED = 256  # rows of prompts that adapters share a product for

Site = tuple[str, ...]  # paths of linears that read the same input, whose outputs lie side by side


@dataclass(frozen=True)
class _Stacked:
    """A [R, in] and B [R, out] of a site; adapter i has the rows from first[i] to first[i + 1], of which each adds to
    the outputs of its span [R, 2]. first_at: first as a tensor."""

    A: Tensor
    B: Tensor
    first: tuple[int, ...]
    first_at: Tensor
    spans: Tensor


class LoraStack:
    """Several task adapters side by side, so that any mix of rows takes two products a site.

    R is the sum of ranks over adapters and over the modules of the site; B has a block for each module's part of the
    output, scaling multiplied into it, and is zero elsewhere. The weights are copies.

    Args:
        loras: by digest, in the order in which they lie.
        sites: all of them; those without a pair are left out.
        shapes: module path -> (out, in).
    """

    def __init__(self, loras: Mapping[str, Lora], sites: Iterable[Site], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.index = {digest: i for i, digest in enumerate(loras)}
        self.sites: dict[Site, _Stacked] = {}
        for site in sites:
            *starts, width = accumulate((shapes[path][0] for path in site), initial=0)
            placed = [  # (adapter, where its module's output starts, pair)
                (i, start, lora.pairs[path])
                for i, lora in enumerate(loras.values())
                for start, path in zip(starts, site, strict=True)
                if path in lora.pairs
            ]
            if placed:
                A = torch.cat([pair.A for _, _, pair in placed])
                B, ranks, row = A.new_zeros(len(A), width), [0] * len(loras), 0
                spans = []
                for i, start, pair in placed:
                    rows = slice(row, row := row + len(pair.A))
                    B[rows, start : start + len(pair.B)] = (pair.B * pair.scaling).mT
                    ranks[i] += len(pair.A)
                    spans += [(start, start + len(pair.B))] * len(pair.A)
                first = (0, *accumulate(ranks))
                self.sites[site] = _Stacked(A, B, first, torch.tensor(first), torch.tensor(spans))


class StackedRows:
    """Which adapter of a stack each row of a batch uses.

    Rows are taken in stretches, with a pair of products each. A stretch of several adapters costs its rows the products
    of all of them: for few rows less than a pair of products for each adapter.

    Args:
        digests: one a row, None: no adapter. The first `num_single` are one stretch; those after them are in the
            stack's order, and adapters share a stretch up to MAX_MIXED rows.
        kernel: computes the first stretch, if there is one.
    """

    def __init__(
        self, stack: LoraStack, digests: Sequence[str | None], num_single: int, kernel: Kernel | None = None
    ) -> None:
        self.stack = stack
        self.kernel = kernel
        self.num_kernel = num_single if kernel is not None else 0
        adapters = [-1 if digest is None else stack.index[digest] for digest in digests]
        parts = [adapters[:num_single]]
        for _, group in groupby(adapters[num_single:]):
            own = list(group)
            if len(parts) > 1 and len(parts[-1]) + len(own) <= MAX_MIXED:
                parts[-1] += own
            else:
                parts.append(own)
        starts = accumulate(map(len, parts), initial=0)
        self._stretches = [
            _Stretch(start, part) for start, part in zip(starts, parts, strict=False) if max(part, default=-1) >= 0
        ]

    def add_(self, site: Site, y: Tensor, x: Tensor) -> None:
        """Adds to y [b, out] in place, each row its own adapter's delta for x [b, in]; to a row without one, nothing.

        Other adapters' columns are cut out between the two products, not multiplied by 0: 0 · infinity is NaN.
        """
        if (stacked := self.stack.sites.get(site)) is not None:
            for stretch in self._stretches:
                if self.kernel is not None and stretch.rows.stop <= self.num_kernel:
                    tensors = stacked.A, stacked.B, stacked.first_at, stacked.spans, stretch.adapters
                    self.kernel.add_lora(y[stretch.rows], x[stretch.rows].contiguous(), *tensors)
                    continue
                rows, columns = stretch.rows, slice(stacked.first[stretch.low], stacked.first[stretch.high])
                z = nn.functional.linear(x[rows], stacked.A[columns])
                if stretch.is_mixed:
                    z.masked_fill_(stretch.foreign(stacked, columns), 0.0)
                y[rows].addmm_(z, stacked.B[columns])


class _Stretch:
    """Rows from `start`, each with its place in a stack or -1; low to high: the adapters among them."""

    def __init__(self, start: int, adapters: Sequence[int]) -> None:
        used = set(adapters)
        self.rows = slice(start, start + len(adapters))
        self.low, self.high = min(used - {-1}), max(used) + 1
        self.is_mixed = len(used) > 1
        self.adapters = torch.tensor(adapters)
        self._foreign: dict[tuple[int, ...], Tensor] = {}

    def foreign(self, stacked: _Stacked, columns: slice) -> Tensor:
        """Bool [rows, columns]: others' columns. Sites on which the same adapters lie with the same ranks share it."""
        if (known := self._foreign.get(stacked.first)) is None:
            counts = torch.tensor(stacked.first).diff()
            owners = torch.arange(len(counts)).repeat_interleave(counts)[columns]
            known = self._foreign[stacked.first] = (owners != self.adapters[:, None]).to(stacked.A.device)
        return known
