"""The arms of the sequential protocol as data: what is fresh, what is shared, what moves (METHOD, section 3)."""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from crma.method.sinkhorn import Mapping

Group = Literal["S", "gamma", "R", "W"]
ArmName = Literal[
    "MODULAR",
    "MODULAR-stop",
    "M=I",
    "free-M",
    "frozen-M",
    "shared-LoRA",
    "FROZEN",
    "FROZEN-matched",
    "NAIVE",
    "JOINT",
]
ALL_GROUPS: tuple[Group, ...] = ("S", "gamma", "R", "W")


@dataclass(frozen=True)
class Arm:
    """One way to learn task after task.

    fresh_lora: a new LoRA for every task, or one LoRA through all of them.
    crma: a shared backbone is trained beside the LoRAs.
    backbone_learns: the backbone moves after task 1 (in the groups that the config names).
    matched: the LoRA rank is raised until its parameters are at least those of LoRA + CRMA; alpha / rank is kept.
    joint: one LoRA on all tasks at once, in as many steps as the others take: nothing is sequential.
    mapping, groups: what stands in M's place, and what of the backbone can move at all.
    """

    name: ArmName
    fresh_lora: bool = True
    crma: bool = False
    backbone_learns: bool = False
    matched: bool = False
    joint: bool = False
    mapping: Mapping = "rounded"
    groups: tuple[Group, ...] = ALL_GROUPS

    def rank(self, rank: int, lora_parameters_per_rank: int, crma_parameters: int) -> int:
        """The LoRA rank that this arm trains."""
        if not self.matched:
            return rank
        return ceil((rank * lora_parameters_per_rank + crma_parameters) / lora_parameters_per_rank)


ARMS: dict[ArmName, Arm] = {
    arm.name: arm
    for arm in (
        Arm("MODULAR", crma=True, backbone_learns=True),
        Arm("MODULAR-stop", crma=True),
        Arm("M=I", crma=True, backbone_learns=True, mapping="identity", groups=("gamma", "R", "W")),
        Arm("free-M", crma=True, backbone_learns=True, mapping="free"),
        Arm("frozen-M", crma=True, backbone_learns=True, groups=("gamma", "R", "W")),
        Arm("shared-LoRA", crma=True, backbone_learns=True, mapping="unbounded", groups=("R", "W")),
        Arm("FROZEN"),
        Arm("FROZEN-matched", matched=True),
        Arm("NAIVE", fresh_lora=False),
        Arm("JOINT", matched=True, joint=True),
    )
}
