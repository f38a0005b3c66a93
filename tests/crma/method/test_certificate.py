"""crma.method.certificate: exact norms, against a dense SVD; `holds` can be false."""

import json

import pytest
import torch
from published import make_backbone
from torch import Tensor

from crma.method.backbone import Backbone, CrmaConfig, FoldedPair
from crma.method.certificate import certify, movement, transfer_norm


def dense_norm(T: Tensor) -> float:
    return torch.linalg.matrix_norm(T.double(), ord=2).item()


def random_pair(rank: int, seed: int, size: float = 1.0) -> FoldedPair:
    generator = torch.Generator().manual_seed(seed)
    return FoldedPair(
        torch.randn(rank, 12, generator=generator),
        size * torch.randn(12, rank, generator=generator),
    )


@pytest.mark.parametrize("rank", [1, 4, 6, 12])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3])
def test_norms_are_those_of_the_dense_matrices(rank: int, size: float) -> None:
    A, B = old = random_pair(rank, rank, size)
    assert transfer_norm(A, B) == pytest.approx(
        dense_norm(torch.eye(12) + B.double() @ A.double()), rel=1e-9
    )
    new = random_pair(rank, 0, size)
    assert movement(old, new) == pytest.approx(dense_norm(new.B @ new.A - B @ A), rel=1e-5)
    assert movement(old, old) == pytest.approx(0, abs=1e-4 * size)
    Q = torch.linalg.qr(A.mT.double())[
        0
    ]  # a shrinking transfer has norm 1 unless it shrinks every direction
    assert transfer_norm(Q.mT, -0.75 * Q) == pytest.approx(0.25 if rank == 12 else 1, abs=1e-12)


def test_the_certificate_says_what_holds_of_the_factors_as_served() -> None:
    parent, backbone = make_backbone(0), make_backbone(1)
    certificate = certify(backbone, parent)
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert certificate["holds"]
    assert certificate["max_norm_deviation"] < 1e-6
    pairs = zip(
        parent.folded("cpu", torch.float32), backbone.folded("cpu", torch.float32), strict=True
    )
    for layer, (old, new) in zip(certificate["layers"], pairs, strict=True):
        assert (layer["gate"], layer["bound"]) == (0.5, 1 + 0.5 * layer["c_M"])
        assert layer["norm"] == pytest.approx(dense_norm(torch.eye(32) + new.B @ new.A), rel=1e-5)
        assert layer["movement"] == pytest.approx(
            dense_norm(new.B @ new.A - old.B @ old.A), rel=1e-5
        )
    for key in ("bound", "norm", "movement"):
        assert certificate[f"max_{key}"] == max(layer[key] for layer in certificate["layers"])
    served = certify(backbone, dtype=torch.bfloat16)
    assert served["dtype"] == "bfloat16"
    assert "max_movement" not in served
    assert 0 < abs(served["max_norm"] - certificate["max_norm"]) < 2**-7


def test_a_map_that_did_not_converge_shows_in_the_deviation() -> None:
    backbone = Backbone(
        CrmaConfig(2, 16, num_streams=4, stream_rank=2, iterations=1, mapping="sinkhorn")
    )
    torch.nn.init.normal_(backbone.S, std=5)
    assert certify(backbone)["max_norm_deviation"] > 1e-3


def test_factors_that_are_not_those_of_the_formula_do_not_hold() -> None:
    class Louder(Backbone):
        def folded(self, device: torch.device | str, dtype: torch.dtype) -> list[FoldedPair]:
            return [FoldedPair(pair.A, 10 * pair.B) for pair in super().folded(device, dtype)]

    backbone = make_backbone()
    assert not certify(Louder.from_tensors(backbone.config, backbone.tensors()))["holds"]
