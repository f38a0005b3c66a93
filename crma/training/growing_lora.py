"""O-LoRA: one LoRA that grows with every task, in directions of its own.

Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning" (EMNLP
Findings): the rows of earlier tasks stand still and go on adding what they add; the new rows of A
are kept orthogonal to them by a penalty.

Shapes: r the rank of a task; t tasks; A [t r, in]; B [out, t r]; of n runs that train together, A
[n, t r, in] and B [n, out, t r].
"""

from functools import partial

import torch
from torch import Tensor, nn

from crma.method.lora import Lora, LoraConfig, LoraPair


def grown_lora(earlier: Lora, new: Lora) -> Lora:
    """A trainable LoRA that adds what both add. Only the rows of `new` get a gradient.

    AdamW without weight decay leaves a component alone whose gradient was always 0.

    Args:
        earlier: that of all earlier tasks.
        new: with the same targets and scaling.
    """
    old_rank = earlier.config.rank
    rank = old_rank + new.config.rank
    config = LoraConfig(rank, new.config.scaling * rank, new.config.target_modules)
    pairs = {}
    for path, pair in new.pairs.items():
        old = earlier.pairs[path]
        A = nn.Parameter(torch.cat([old.A.detach().float(), pair.A.detach()]))
        B = nn.Parameter(torch.cat([old.B.detach().float(), pair.B.detach()], dim=1))
        A.register_hook(partial(_without_first, old_rank, 0))  # type: ignore[no-untyped-call]
        B.register_hook(partial(_without_first, old_rank, 1))  # type: ignore[no-untyped-call]
        pairs[path] = LoraPair(A, B, pair.scaling)
    return Lora(config, pairs)


def overlap(lora: Lora, new_rank: int) -> Tensor:
    """The sum of |A_i A_tᵀ| over all pairs: differentiable, 0 for the first task; [] or [n].

    Args:
        lora: a grown one, of one run or of several.
        new_rank: r, the number of last rows that belong to the newest task.
    """
    sums = []
    for pair in lora.pairs.values():
        old, new = pair.A[..., :-new_rank, :].detach(), pair.A[..., -new_rank:, :]
        sums.append((old @ new.mT).abs().sum((-2, -1)))
    return torch.stack(sums).sum(0)


def newest(lora: Lora, new_rank: int) -> list[Tensor]:
    """1 where a value of the LoRA belongs to the newest task, otherwise 0, by parameter.

    Args:
        lora: as in `overlap`.
        new_rank: as there.
    """
    found = []
    for _, pair in sorted(lora.pairs.items()):  # as `Lora.parameters` orders them
        A, B = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
        A[..., -new_rank:, :] = 1
        B[..., -new_rank:] = 1
        found += [A, B]
    return found


def _without_first(count: int, dim: int, gradient: Tensor) -> Tensor:
    """A gradient that is 0 in the first rows or columns."""
    kept = gradient.clone()
    kept.narrow(dim, 0, count).zero_()
    return kept
