"""The certificate of a backbone: the bounds that hold by construction, checked on served factors.

For each layer, with A [nk, d] and B [d, nk] in the serving dtype: T = I + B A and
||T||_2 <= 1 + c_M g.

Two limits. The product of the bounds over the depth covers the adapters alone and says nothing of
the network between them. And a bound on a norm is no bound on drift: drift must be measured.
"""

import math
from typing import Any

import torch
from torch import Tensor

from crma.method.backbone import Backbone, FoldedPair
from crma.method.sinkhorn import norm_bound


def transfer_norm(A: Tensor, B: Tensor) -> float:
    """||I + B A||_2 exactly, from a QR of [Aᵀ, B]: outside their joint range, T is the identity.

    Args:
        A: [nk, d]
        B: [d, nk]
    """
    A = A.double()
    B = B.double()
    Q, _ = torch.linalg.qr(torch.cat([A.mT, B], dim=1))
    identity = torch.eye(Q.shape[1], dtype=Q.dtype)
    restricted = identity + (Q.mT @ B) @ (A @ Q)
    norm = torch.linalg.matrix_norm(restricted, ord=2).item()
    joint_range_is_everything = Q.shape[0] <= Q.shape[1]
    return norm if joint_range_is_everything else max(1.0, norm)


def movement(old: FoldedPair, new: FoldedPair) -> float:
    """||B'A' - B A||_2: the distance between two versions of one layer, in the spectral norm."""
    left = torch.cat([new.B, -old.B], dim=1).double()
    right = torch.cat([new.A, old.A], dim=0).double()
    _, upper = torch.linalg.qr(left)
    _, lower = torch.linalg.qr(right.mT)
    return torch.linalg.matrix_norm(upper @ lower.mT, ord=2).item()


def certify(
    backbone: Backbone, parent: Backbone | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The certificate of a backbone as served in `dtype`, as plain JSON values.

    Args:
        backbone: the backbone to certify.
        parent: the version it was trained from; adds "movement".
        dtype: of the folded factors.

    Returns:
        "dtype"; "max_norm_deviation", the largest |c_M - 1|; "max_bound", "max_norm" and, with a
        parent, "max_movement", the largest over the layers; "log_bound_product", the sum of the
        layers' log bounds; "holds", whether every exact norm is within its bound up to the rounding
        of `dtype`; "layers", a list of {"c_M", "gate", "bound", "norm", "movement"?}.
    """
    with torch.no_grad():
        factors = backbone.factors()
    c_M = norm_bound(factors.M)
    pairs = backbone.folded("cpu", dtype)
    layers = [
        _certify_layer(c, g, pair)
        for c, g, pair in zip(c_M, factors.g.double(), pairs, strict=True)
    ]
    if parent is not None:
        for layer, old, new in zip(layers, parent.folded("cpu", dtype), pairs, strict=True):
            layer["movement"] = movement(old, new)
    slack = 4 * torch.finfo(dtype).eps
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_norm_deviation": (c_M - 1.0).abs().max().item(),
        **_largest(layers),
        "log_bound_product": math.fsum(math.log(layer["bound"]) for layer in layers),
        "holds": all(layer["norm"] <= layer["bound"] + slack for layer in layers),
        "layers": layers,
    }


def _certify_layer(c_M: Tensor, gate: Tensor, pair: FoldedPair) -> dict[str, float]:
    """The bound and the exact norm of one layer; c_M and gate are float64 scalars."""
    return {
        "c_M": c_M.item(),
        "gate": gate.item(),
        "bound": 1.0 + (c_M * gate).item(),
        "norm": transfer_norm(*pair),
    }


def _largest(layers: list[dict[str, float]]) -> dict[str, float]:
    """ "max_<name>" -> the largest over the layers, for "bound", "norm" and, if any, "movement"."""
    measures = [name for name in layers[0] if name not in ("c_M", "gate")]
    result = {}
    for name in measures:
        result[f"max_{name}"] = max(layer[name] for layer in layers)
    return result
