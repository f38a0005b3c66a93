"""How many CPUs a control group of Linux gives this process, as containers set it.

The system shows all cores to a container. With more threads than its share, a step waits: all of
them are stopped for the rest of a period once the share is used up.
"""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def cpu_quota() -> int | None:
    """Whole CPUs of the smallest quota on this process, at least 1; None: there is no quota."""
    quotas = [_quota(folder) for folder in _groups()]
    smallest = min((quota for quota in quotas if quota is not None), default=None)
    return None if smallest is None else max(1, int(smallest))


def _groups() -> Iterator[Path]:
    """The folders of this process's group and of those around it, where they may be.

    In a container its own group is usually the root that it sees; outside, a group has its path.
    """
    if not PROC.exists():  # not Linux
        return
    for line in PROC.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts = [ROOT, ROOT / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [ROOT / controllers, ROOT / "cpu"]
        else:
            continue
        group = Path(path.lstrip("/"))
        for mount in mounts:
            for inner in (group, *group.parents):
                yield mount / inner


def _quota(folder: Path) -> float | None:
    """CPUs that a group may use, as version 2 or 1 of the interface says it; None: no limit."""
    try:
        limit, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit in ("max", "-1"):
        return None
    return int(limit) / int(period)
