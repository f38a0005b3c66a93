"""server.engine.native.cpu_quota: a container's share of the CPUs, as Linux says it."""

from pathlib import Path

import pytest

from server.engine.native import cpu_quota

V2 = "0::/pod/box\n"
V1 = "5:memory:/pod\n3:cpu,cpuacct:/pod/box\n0::/\n"


def pretend(
    monkeypatch: pytest.MonkeyPatch, folder: Path, groups: str, files: dict[str, str]
) -> None:
    """Let Linux have these groups and files."""
    proc = folder / "cgroup"
    proc.write_text(groups)
    for name, text in files.items():
        file = folder / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(cpu_quota, "PROC", proc)
    monkeypatch.setattr(cpu_quota, "ROOT", folder / "root")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"pod/box/cpu.max": "250000 100000\n"}, 2),
        (V2, {"pod/box/cpu.max": "50000 100000\n"}, 1),
        (V2, {"pod/box/cpu.max": "max 100000\n"}, None),
        (V2, {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "300000 100000\n"}, 3),
        (V2, {"pod/box/cpu.max": "800000 100000\n", "pod/cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {}, None),
        (
            V1,
            {
                "cpu,cpuacct/pod/box/cpu.cfs_quota_us": "600000\n",
                "cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_the_smallest_quota_counts_in_whole_cpus(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    groups: str,
    files: dict[str, str],
    expected: int | None,
) -> None:
    pretend(monkeypatch, tmp_path, groups, files)
    assert cpu_quota.cpu_quota() == expected


def test_there_is_no_quota_where_there_is_no_linux(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_quota, "PROC", tmp_path / "none")
    assert cpu_quota.cpu_quota() is None
