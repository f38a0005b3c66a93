"""The map from logits to a doubly stochastic matrix, and a bound on a matrix's spectral norm.

Shapes: n streams; [..] any leading batch dimensions (all layers of a backbone go in one call).

The map runs in float32 and never under autocast: a matrix is doubly stochastic only as far as its
sums are accurate.
"""

from typing import Literal

import torch
from torch import Tensor

MixingMap = Literal["rounded", "sinkhorn", "identity", "free", "unbounded"]
"""How a backbone mixes its streams. The last three are experimental controls: see `Backbone`."""


def sinkhorn(S: Tensor, iterations: int) -> Tensor:
    """exp(S) after alternating row and column normalisation (Sinkhorn & Knopp 1967), in log space.

    Args:
        S: [.., n, n] float32 logits.
        iterations: the number of row-then-column alternations.

    Returns:
        [.., n, n] positive. Columns sum to 1 to float precision; rows only as far as the
        alternation has converged.
    """
    for _ in range(iterations):
        S = S - torch.logsumexp(S, dim=-1, keepdim=True)
        S = S - torch.logsumexp(S, dim=-2, keepdim=True)
    return S.exp()


def round_to_doubly_stochastic(P: Tensor) -> Tensor:
    """Round onto the doubly stochastic matrices (Altschuler, Weed & Rigollet 2017, Algorithm 2).

    Scales rows, then columns, by min(1, 1/sum), and adds the missing mass as a rank-1 term.

    Args:
        P: [.., n, n] non-negative.

    Returns:
        [.., n, n], every row and column of which sums to 1 within a few float32 ulps.
    """
    P = P * (1.0 / P.sum(-1, keepdim=True)).clamp(max=1.0)
    P = P * (1.0 / P.sum(-2, keepdim=True)).clamp(max=1.0)
    missing_rows = 1.0 - P.sum(-1, keepdim=True)
    missing_columns = 1.0 - P.sum(-2, keepdim=True)
    mass = missing_rows.abs().sum(-2, keepdim=True)
    # The floor only affects a mass that is rounding noise. Without it, the gradient would be noise
    # divided by zero.
    return P + missing_rows * missing_columns / mass.clamp(min=torch.finfo(P.dtype).eps)


def doubly_stochastic(
    S: Tensor, *, iterations: int = 20, cap: float = 6.0, mapping: MixingMap = "rounded"
) -> Tensor:
    """The map DS of docs/method.md, section 2: soft cap, Sinkhorn in log space, then rounding.

    Args:
        S: [.., n, n] raw logits of any size.
        iterations: the number of alternations before the rounding.
        cap: c of the soft cap c·tanh(S/c). It keeps logits within (-c, c), so that no entry
            underflows and no gradient vanishes.
        mapping: "rounded"; or "sinkhorn", which skips the rounding, so that row sums are only as
            accurate as the alternation has converged.

    Returns:
        [.., n, n] float32.
    """
    with torch.autocast(S.device.type, enabled=False):
        P = sinkhorn(cap * torch.tanh(S.float() / cap), iterations)
        return round_to_doubly_stochastic(P) if mapping == "rounded" else P


def norm_bound(M: Tensor) -> Tensor:
    """c_M = sqrt(max row sum · max column sum) of |M|, an upper bound on the norm ||M||_2.

    It holds for every matrix, because ||M||_2² <= ||M||_1 ||M||_inf. A doubly stochastic matrix has
    norm exactly 1, so a value of 1 shows that the map converged, and says nothing about learning.

    Args:
        M: [.., n, n]

    Returns:
        [..] float64
    """
    magnitude = M.double().abs()
    return (magnitude.sum(-1).amax(-1) * magnitude.sum(-2).amax(-1)).sqrt()
