"""crma.method.certificate: norms equal those of a dense SVD, and `holds` can be false."""

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
    A = torch.randn(rank, 12, generator=generator)
    B = size * torch.randn(12, rank, generator=generator)
    return FoldedPair(A, B)


@pytest.mark.parametrize("rank", [1, 4, 6, 12])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3])
def test_norms_equal_those_of_the_dense_matrices(rank: int, size: float) -> None:
    old = random_pair(rank, rank, size)
    new = random_pair(rank, 0, size)
    transfer = torch.eye(12) + old.B.double() @ old.A.double()
    assert transfer_norm(*old) == pytest.approx(dense_norm(transfer), rel=1e-9)
    difference = new.B @ new.A - old.B @ old.A
    assert movement(old, new) == pytest.approx(dense_norm(difference), rel=1e-5)
    assert movement(old, old) == pytest.approx(0, abs=1e-4 * size)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (4, 1), (6, 1), (12, 0.25)])
def test_a_shrinking_transfer_has_norm_1_unless_it_shrinks_every_direction(
    rank: int, expected: float
) -> None:
    Q, _ = torch.linalg.qr(random_pair(rank, rank).A.mT.double())
    assert transfer_norm(Q.mT, -0.75 * Q) == pytest.approx(expected, abs=1e-12)


def test_the_certificate_describes_the_factors_as_served() -> None:
    parent, backbone = make_backbone(0), make_backbone(1)
    certificate = certify(backbone, parent)
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert certificate["holds"]
    assert certificate["max_norm_deviation"] < 1e-6
    olds = parent.folded("cpu", torch.float32)
    news = backbone.folded("cpu", torch.float32)
    for layer, old, new in zip(certificate["layers"], olds, news, strict=True):
        assert (layer["gate"], layer["bound"]) == (0.5, 1 + 0.5 * layer["c_M"])
        transfer = torch.eye(32) + new.B @ new.A
        assert layer["norm"] == pytest.approx(dense_norm(transfer), rel=1e-5)
        difference = new.B @ new.A - old.B @ old.A
        assert layer["movement"] == pytest.approx(dense_norm(difference), rel=1e-5)
    for key in ("bound", "norm", "movement"):
        assert certificate[f"max_{key}"] == max(layer[key] for layer in certificate["layers"])
    served = certify(backbone, dtype=torch.bfloat16)
    assert served["dtype"] == "bfloat16"
    assert "max_movement" not in served
    assert 0 < abs(served["max_norm"] - certificate["max_norm"]) < 2**-7


def test_an_unconverged_map_shows_in_the_deviation() -> None:
    config = CrmaConfig(2, 16, num_streams=4, stream_rank=2, iterations=1, mapping="sinkhorn")
    backbone = Backbone(config)
    torch.nn.init.normal_(backbone.S, std=5)
    assert certify(backbone)["max_norm_deviation"] > 1e-3


def test_factors_that_exceed_the_bound_do_not_hold() -> None:
    class Louder(Backbone):
        """Serves ten times the update that its factors give."""

        def folded(self, device: torch.device | str, dtype: torch.dtype) -> list[FoldedPair]:
            return [FoldedPair(pair.A, 10 * pair.B) for pair in super().folded(device, dtype)]

    backbone = make_backbone()
    assert not certify(Louder.from_tensors(backbone.config, backbone.tensors()))["holds"]
