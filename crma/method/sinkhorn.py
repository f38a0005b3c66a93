"""Logits -> doubly stochastic matrix, and a rigorous bound on its spectral norm.

Shapes: n streams; any leading batch dimensions (the layers of a backbone are mapped in one call).
Everything here is float32 and never autocast: a doubly stochastic matrix is only as good as its sums.
"""

from typing import Literal

import torch
from torch import Tensor

Mapping = Literal[
    "rounded", "sinkhorn", "identity", "free", "unbounded"
]  # the last three: controls, adapter.Backbone


def sinkhorn(S: Tensor, iterations: int) -> Tensor:
    """exp(S) after `iterations` log-domain row and column normalisations (Sinkhorn & Knopp 1967).

    Args:
        S: [.., n, n] float32 logits.
        iterations: row-then-column alternations.

    Returns:
        [.., n, n] positive; columns sum to 1 to float precision, rows only as far as it converged.
    """
    for _ in range(iterations):
        S = S - torch.logsumexp(S, dim=-1, keepdim=True)
        S = S - torch.logsumexp(S, dim=-2, keepdim=True)
    return S.exp()


def round_to_doubly_stochastic(P: Tensor) -> Tensor:
    """The rounding of Altschuler, Weed & Rigollet 2017 (Algorithm 2) onto the Birkhoff polytope.

    Scales rows, then columns, by min(1, 1/sum), and gives the missing mass back as a rank-1 term, so
    every row and column sums to 1 within a few float32 ulps for every non-negative P.

    Args:
        P: [.., n, n] non-negative.
    """
    P = P * (1.0 / P.sum(-1, keepdim=True)).clamp(max=1.0)
    P = P * (1.0 / P.sum(-2, keepdim=True)).clamp(max=1.0)
    missing_rows = 1.0 - P.sum(-1, keepdim=True)
    missing_columns = 1.0 - P.sum(-2, keepdim=True)
    mass = missing_rows.abs().sum(-2, keepdim=True)
    # The floor only meets masses that are rounding noise; without it their gradient would be noise over zero.
    return P + missing_rows * missing_columns / mass.clamp(min=torch.finfo(P.dtype).eps)


def doubly_stochastic(
    S: Tensor, *, iterations: int = 20, cap: float = 6.0, mapping: Mapping = "rounded"
) -> Tensor:
    """The map DS of METHOD: soft cap, log-domain Sinkhorn, then the rounding.

    Args:
        S: [.., n, n] raw logits of any size.
        iterations: alternations before the rounding.
        cap: c of the soft cap c·tanh(S/c), which keeps logits in (-c, c): no entry underflows, gradients stay alive.
        mapping: "rounded", or "sinkhorn" for the plain alternation (a fidelity option: its row sums are only
            as good as its convergence).

    Returns:
        [.., n, n] float32.
    """
    with torch.autocast(S.device.type, enabled=False):
        P = sinkhorn(cap * torch.tanh(S.float() / cap), iterations)
        return round_to_doubly_stochastic(P) if mapping == "rounded" else P


def norm_bound(M: Tensor) -> Tensor:
    """c_M = sqrt(max row sum · max column sum) of |M|, in float64: at least ||M||_2 for every matrix.

    (||M||_2² <= ||M||_1 ||M||_inf.) Every doubly stochastic matrix has norm exactly 1, so this shows that the
    map converged, and nothing about learning.

    Args:
        M: [.., n, n]

    Returns:
        [..] float64
    """
    magnitude = M.double().abs()
    return (magnitude.sum(-1).amax(-1) * magnitude.sum(-2).amax(-1)).sqrt()
