"""The arms of the sequential protocol, as data (docs/method.md, section 3).

An arm says which adapters are new for each task, which are shared, and which parameters train.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, NamedTuple

from crma.method.sinkhorn import MixingMap

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
    "FROZEN-warm-last",
    "FROZEN-warm-mean",
    "SLOW-FAST",
    "SLOW-FAST_M=I",
    "SLOW-FAST_free-M",
    "NULL-SPACE",
    "NULL-SPACE_M=I",
    "NULL-SPACE_free-M",
    "PRIVATE",
    "ORACLE",
    "ORACLE-loo",
    "NAIVE",
    "O-LoRA",
    "JOINT",
]
ALL_GROUPS: tuple[Group, ...] = ("S", "gamma", "R", "W")


@dataclass(frozen=True)
class Arm:
    """One way to learn task after task.

    Attributes:
        name: the arm's name in configurations, records and tables.
        fresh_lora: every task has a LoRA of its own; otherwise one LoRA learns all tasks in turn.
        warm: where the LoRA of a later task starts. None: anew. "last": at that of the task before.
            "mean": at the mean of the B of all earlier tasks, with the A of task 1, which does not
            train again.
        grows: the one LoRA gets new rows for every task. Only they learn, kept orthogonal to those
            of earlier tasks (`growing_lora`).
        crma: a backbone trains beside the LoRAs.
        backbone_learns: the backbone keeps training after task 1, in the parameter groups that the
            configuration names.
        slow: the backbone trains at its full rates on every task t, and then goes back to 1 / t of
            the way. The LoRA trains with it for half of the epochs, and alone for the others.
        protects: after task 1 only R trains, and only in directions that no block output of an
            earlier task has.
        private: every task has a backbone of its own, from the same start, and is served under it
            for ever. Nothing is shared.
        pretrained_on: the backbone trains alone, before any LoRA, and stands still afterwards.
            "union": once, on all tasks. "others": for each task anew, on all tasks but that one.
        matched: the LoRA rank is raised until the LoRA has at least as many parameters as
            LoRA + CRMA; alpha / rank stays the same.
        joint: one LoRA trains on all tasks at once, for the same total number of steps. Nothing is
            sequential.
        mapping: the map from the logits S to the mixing matrix M, or the control that replaces it.
        groups: the backbone's parameter groups that may train at all.
    """

    name: ArmName
    fresh_lora: bool = True
    warm: Literal["last", "mean"] | None = None
    grows: bool = False
    crma: bool = False
    backbone_learns: bool = False
    slow: bool = False
    protects: bool = False
    private: bool = False
    pretrained_on: Literal["union", "others"] | None = None
    matched: bool = False
    joint: bool = False
    mapping: MixingMap = "rounded"
    groups: tuple[Group, ...] = ALL_GROUPS

    @property
    def stages_are_apart(self) -> bool:
        """Whether no stage needs what an earlier one trained."""
        shares = (self.crma and not self.private) or self.warm is not None or not self.fresh_lora
        return not shares and not self.joint

    def rank(self, rank: int, lora_parameters_per_rank: int, crma_parameters: int) -> int:
        """The LoRA rank that this arm trains.

        Args:
            rank: the configured rank.
            lora_parameters_per_rank: parameters of a rank-1 LoRA on the same modules.
            crma_parameters: parameters of the backbone that the rank must make up for.

        Returns:
            `rank`; in a matched arm, the smallest rank with at least as many parameters as a LoRA
            of `rank` and the backbone together.
        """
        if not self.matched:
            return rank
        wanted = rank * lora_parameters_per_rank + crma_parameters
        return ceil(wanted / lora_parameters_per_rank)


_WITHOUT_S: tuple[Group, ...] = ("gamma", "R", "W")
_SLOW_FAST = Arm("SLOW-FAST", crma=True, backbone_learns=True, slow=True)
_NULL_SPACE = Arm("NULL-SPACE", crma=True, backbone_learns=True, protects=True)

ARMS: dict[ArmName, Arm] = {
    arm.name: arm
    for arm in (
        Arm("MODULAR", crma=True, backbone_learns=True),
        Arm("MODULAR-stop", crma=True),
        Arm("M=I", crma=True, backbone_learns=True, mapping="identity", groups=_WITHOUT_S),
        Arm("free-M", crma=True, backbone_learns=True, mapping="free"),
        Arm("frozen-M", crma=True, backbone_learns=True, groups=_WITHOUT_S),
        Arm("shared-LoRA", crma=True, backbone_learns=True, mapping="unbounded", groups=("R", "W")),
        Arm("FROZEN"),
        Arm("FROZEN-matched", matched=True),
        Arm("NAIVE", fresh_lora=False),
        Arm("JOINT", matched=True, joint=True),
        _SLOW_FAST,
        replace(_SLOW_FAST, name="SLOW-FAST_M=I", mapping="identity", groups=_WITHOUT_S),
        replace(_SLOW_FAST, name="SLOW-FAST_free-M", mapping="free"),
        _NULL_SPACE,
        replace(_NULL_SPACE, name="NULL-SPACE_M=I", mapping="identity", groups=_WITHOUT_S),
        replace(_NULL_SPACE, name="NULL-SPACE_free-M", mapping="free"),
        Arm("PRIVATE", crma=True, private=True),
        Arm("ORACLE", crma=True, pretrained_on="union"),
        Arm("ORACLE-loo", crma=True, private=True, pretrained_on="others"),
        Arm("FROZEN-warm-last", warm="last"),
        Arm("FROZEN-warm-mean", warm="mean"),
        Arm("O-LoRA", fresh_lora=False, grows=True),
    )
}


class MixingControls(NamedTuple):
    """Two arms that differ from another one in M only: M = I, and M = S without Sinkhorn."""

    identity: ArmName
    free: ArmName


MIXING_CONTROLS: dict[ArmName, MixingControls] = {
    "MODULAR": MixingControls("M=I", "free-M"),
    "SLOW-FAST": MixingControls("SLOW-FAST_M=I", "SLOW-FAST_free-M"),
    "NULL-SPACE": MixingControls("NULL-SPACE_M=I", "NULL-SPACE_free-M"),
}
