"""Classes of processors, for each of which the kernel is built.

A class needs no more than Linux lists for a core; on other systems there is only `generic`.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_LISTS = ("flags", "Features")  # how Linux names the list of a core: on x86, on Arm

_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_VNNI = _V4 | {"avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}
_AMX = _BF16 | {"amx_tile", "amx_bf16"}

_V4_OPTIONS = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_BF16_OPTIONS = (*_V4_OPTIONS, "-mavx512vnni", "-mavx512bf16")


@dataclass(frozen=True)
class CpuClass:
    """Processors that one build of the kernel suits.

    Args:
        name: how the setting `kernel` names it; part of the name of the built file.
        machine: as `platform.machine` says it; None: any.
        options: of the compiler.
        needs: what Linux must list for a core, or the build would be killed by an instruction.
        multiplies_bfloat16: as it is; others multiply float.
        stand_in: name of the class that serves such processors unless this one is named, because
            it has not been measured on one; None: it has been.
    """

    name: str
    machine: str | None
    options: tuple[str, ...]
    needs: frozenset[str]
    multiplies_bfloat16: bool = False
    stand_in: str | None = None


GENERIC = CpuClass("generic", None, (), frozenset())  # on Arm it has NEON

CPU_CLASSES = (  # the best first
    CpuClass(
        "amx", "x86_64", (*_BF16_OPTIONS, "-mamx-tile", "-mamx-bf16"), _AMX, True, "avx512vnni"
    ),
    CpuClass("avx512bf16", "x86_64", _BF16_OPTIONS, _BF16, True),
    CpuClass("avx512vnni", "x86_64", (*_V4_OPTIONS, "-mavx512vnni"), _VNNI),
    CpuClass("avx512", "x86_64", _V4_OPTIONS, _V4),
    CpuClass("avx2", "x86_64", ("-march=x86-64-v3",), _V3),
    GENERIC,
)


def classes_of(machine: str) -> list[CpuClass]:
    """The classes of a machine, best first."""
    return [each for each in CPU_CLASSES if each.machine in (machine, None)]


def own_classes() -> list[CpuClass]:
    """The classes that this processor belongs to, best first."""
    offered = _offered()
    return [each for each in classes_of(platform.machine()) if each.needs <= offered]


def default_classes() -> list[CpuClass]:
    """The classes that serve this processor unless one is named, best first."""
    own = own_classes()
    first = own[0].stand_in or own[0].name
    names = [each.name for each in own]
    return own[names.index(first) :]


def _offered() -> frozenset[str]:
    """What Linux lists for the first core; nothing on another system."""
    if not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text().splitlines():
        name, _, listed = line.partition(":")
        if name.strip() in _LISTS:
            return frozenset(listed.split())
    return frozenset()
