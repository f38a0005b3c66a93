"""server.service.disk_space: the free room of the folders that the server writes to."""

import shutil
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from server.service.disk_space import DiskSpace
from server.service.metrics import Metrics


def sample(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"folder": "store"})


def test_the_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    metrics = Metrics(CollectorRegistry())
    DiskSpace({"store": tmp_path / "not" / "yet"}, metrics).measure()
    assert sample(metrics, "crma_disk_size_bytes") == shutil.disk_usage(tmp_path).total
    free = sample(metrics, "crma_disk_free_bytes")
    assert free is not None
    assert 0 < free <= shutil.disk_usage(tmp_path).total


def test_a_folder_that_cannot_be_measured_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(CollectorRegistry())
    disks = DiskSpace({"store": tmp_path}, metrics)
    disks.measure()

    def fail(_: Path) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    disks.measure()
    assert sample(metrics, "crma_disk_free_bytes") is None
    assert sample(metrics, "crma_disk_size_bytes") is None
