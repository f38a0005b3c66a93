"""Classes of processors: what the kernel is built for before it is known where it will run."""

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_LISTS = ("flags", "Features")  # how Linux names the list of a core: on x86, on Arm

_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}


@dataclass(frozen=True)
class CpuClass:
    """Processors that one build of the kernel suits.

    Args:
        name: part of the name of the built file.
        machine: as `platform.machine` says it.
        options: of the compiler.
        needs: what Linux must list for a core, or the build would be killed by an instruction.
    """

    name: str
    machine: str
    options: tuple[str, ...]
    needs: frozenset[str]


# Of each machine, the best class first. The kernel has code of its own for VNNI (8-bit products);
# AMX and AVX512-BF16 would change nothing, because torch computes the other products.
CPU_CLASSES = (
    CpuClass(
        "avx512-vnni",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
        _V4 | {"avx512_vnni"},
    ),
    CpuClass("avx512", "x86_64", ("-march=x86-64-v4", "-mprefer-vector-width=512"), _V4),
    CpuClass("avx2", "x86_64", ("-march=x86-64-v3",), _V3),
    CpuClass("armv8", "aarch64", ("-march=armv8-a",), frozenset({"asimd"})),
)


def classes_of(machine: str) -> list[CpuClass]:
    """The classes of a machine, best first; none for one that has no class."""
    return [each for each in CPU_CLASSES if each.machine == machine]


def own_classes() -> list[CpuClass]:
    """The classes that this processor belongs to, best first."""
    offered = _offered()
    return [each for each in classes_of(platform.machine()) if each.needs <= offered]


def _offered() -> frozenset[str]:
    """What Linux lists for the first core; nothing on another system."""
    if not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text().splitlines():
        name, _, listed = line.partition(":")
        if name.strip() in _LISTS:
            return frozenset(listed.split())
    return frozenset()
