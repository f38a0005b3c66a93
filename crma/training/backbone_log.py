"""Measures of the backbone: logged at every step of a run, and summarised in its record.

The norm of M alone cannot show that a backbone learns: every doubly stochastic matrix has norm 1.

Shapes: L layers, n streams; M and M_0 [L, n, n].
"""

from collections.abc import Sequence
from itertools import islice
from statistics import median_high
from typing import Any

import torch
from torch import Tensor

from crma.method.backbone import Backbone

StepLog = dict[str, list[float]]  # measure -> a value for each layer


def measure_backbone(backbone: Backbone, M_0: Tensor, ratios: Tensor) -> StepLog:
    """Measure every layer of a backbone after a backward pass.

    Args:
        backbone: the one that trains.
        M_0: its mixing matrices at the start of the run.
        ratios: ||dh|| / ||h|| of every layer in the last forward pass, [L]; [0] if there was none.

    Returns:
        grad_S: ||dloss/dS||_F; 0 if S does not train.
        moved: ||M - M_0||_F.
        entropy: mean entropy of the rows of M, in nats.
        sigma_2: second singular value of M.
        c_M_minus_1: largest deviation of a row's or column's absolute sum from 1.
        gate: g.
        W_norm: ||Ŵ||_2.
        dh: ||dh|| / ||h||, the size of the update relative to the residual stream.
    """
    with torch.no_grad():
        M = backbone.mixing()
        measured = {
            "grad_S": _gradient_norm(backbone.S),
            "moved": (M - M_0).flatten(1).norm(dim=1),
            "entropy": -(M.clamp(min=1e-30).log() * M).sum(-1).mean(-1),
            "sigma_2": torch.linalg.svdvals(M)[:, 1],
            "c_M_minus_1": torch.maximum(_sum_deviation(M, -1), _sum_deviation(M, -2)),
            "gate": torch.sigmoid(backbone.gamma),
            "W_norm": _bounded_norm(backbone.W),
            "dh": ratios,
        }
        # One copy from the device, which the CPU waits for.
        flat = torch.cat([values.to(M) for values in measured.values()]).tolist()
    values = map(_rounded, flat)
    return {name: list(islice(values, len(found))) for name, found in measured.items()}


def summarise(log: Sequence[StepLog]) -> dict[str, Any]:
    """Summarise all logged steps: the figure that the paper quotes, and what it cannot show.

    Args:
        log: as `measure_backbone` returns it, one item for each step; not empty.

    Returns:
        steps: how many were logged.
        max_norm_deviation: the largest deviation from norm 1, over steps and layers.
        median_grad_S: median over steps of the largest gradient norm of S.
        max_moved_last: the largest distance of M from its start after the last step.
    """
    return {
        "steps": len(log),
        "max_norm_deviation": max(max(step["c_M_minus_1"]) for step in log),
        "median_grad_S": median_high(max(step["grad_S"]) for step in log),
        "max_moved_last": max(log[-1]["moved"]),
    }


def _gradient_norm(S: Tensor) -> Tensor:
    if S.grad is None:
        return torch.zeros(len(S), device=S.device)
    return S.grad.flatten(1).norm(dim=1)


def _sum_deviation(M: Tensor, dim: int) -> Tensor:
    """[L]: the largest |absolute sum along `dim` - 1|."""
    return (M.abs().sum(dim) - 1).abs().amax(-1)


def _bounded_norm(W: Tensor) -> Tensor:
    """[L]: the spectral norm of W [L, d, nk] after bounding it by 1."""
    largest = torch.linalg.eigvalsh(W.mT @ W)[:, -1]
    return largest.clamp(min=0, max=1).sqrt()


def _rounded(value: float) -> float:
    """Six significant digits: the log is read by people and compared between runs."""
    return float(f"{value:.6g}")
