"""What holds of a backbone by construction, computed on the factors as served, and what that does not say.

Per layer, with A [nk, d] and B [d, nk] in the dtype that serves: T = I + B A, and ||T||_2 <= 1 + c_M g.
The products over the depth are of adapter factors alone: they say nothing of the network between them. A norm bound
is no bound on drift; drift is measured.
"""

import math
from typing import Any

import torch
from torch import Tensor

from crma.method.backbone import Backbone, FoldedPair
from crma.method.sinkhorn import norm_bound


def transfer_norm(A: Tensor, B: Tensor) -> float:
    """||I + B A||_2 exactly, from a QR of [Aᵀ, B]: outside their joint range T is the identity.

    Args:
        A: [nk, d]; B: [d, nk].
    """
    A, B = A.double(), B.double()
    Q, _ = torch.linalg.qr(torch.cat([A.mT, B], dim=1))
    inside = torch.linalg.matrix_norm(
        torch.eye(Q.shape[1], dtype=Q.dtype) + (Q.mT @ B) @ (A @ Q), ord=2
    ).item()
    return max(1.0, inside) if Q.shape[0] > Q.shape[1] else inside


def movement(old: FoldedPair, new: FoldedPair) -> float:
    """||B'A' - B A||_2: how far one layer moved, in the spectral norm."""
    left = torch.cat([new.B, -old.B], dim=1).double()
    right = torch.cat([new.A, old.A], dim=0).double()
    _, upper = torch.linalg.qr(left)
    _, lower = torch.linalg.qr(right.mT)
    return torch.linalg.matrix_norm(upper @ lower.mT, ord=2).item()


def certify(
    backbone: Backbone, parent: Backbone | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The certificate of a backbone as served in `dtype`; JSON-able.

    Args:
        backbone: raw parameters.
        parent: the version it was trained from; gives `movement`.
        dtype: of the folded factors.

    Returns:
        {"dtype", "max_norm_deviation" (largest |c_M - 1|), "layers": [{"c_M", "gate", "bound", "norm", "movement"?}],
        "max_bound", "max_norm", "log_bound_product", "max_movement"?, "holds"}; `holds` says that every exact norm is
        within its bound, up to the rounding of `dtype`.
    """
    with torch.no_grad():
        factors = backbone.factors()
    c_M, gates = norm_bound(factors.M), factors.g.double()
    pairs = backbone.folded("cpu", dtype)
    layers = [
        {
            "c_M": c.item(),
            "gate": g.item(),
            "bound": 1.0 + (c * g).item(),
            "norm": transfer_norm(*pair),
        }
        for c, g, pair in zip(c_M, gates, pairs, strict=True)
    ]
    if parent is not None:
        for layer, old, new in zip(layers, parent.folded("cpu", dtype), pairs, strict=True):
            layer["movement"] = movement(old, new)
    slack = 4 * torch.finfo(dtype).eps
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_norm_deviation": (c_M - 1.0).abs().max().item(),
        **{
            f"max_{name}": max(layer[name] for layer in layers)
            for name in layers[0]
            if name not in ("c_M", "gate")
        },
        "log_bound_product": math.fsum(math.log(layer["bound"]) for layer in layers),
        "holds": all(layer["norm"] <= layer["bound"] + slack for layer in layers),
        "layers": layers,
    }
