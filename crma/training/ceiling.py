"""The ceiling: what a backbone that learned all other tasks in advance gives to a task.

No protocol can teach a backbone more about a task without seeing it, so what ORACLE-loo does not
reach, no protocol of this shape reaches. ORACLE has seen the task too: it is an upper end without a
claim.
"""

from collections.abc import Sequence
from typing import NamedTuple

from crma.core.errors import ConfigError
from crma.evaluation.statistics import t_interval
from crma.training.endpoint import advantages, by_seed, prior_loss
from crma.training.pairing import Record

TARGET = 2.0  # percent: what the paper claims, and what a protocol should be able to reach
HONEST = "ORACLE-loo"
ORACLES = (HONEST, "ORACLE")
RIVALS = ("PRIVATE", "FROZEN-matched")


class Reach(NamedTuple):
    """Whether a protocol could reach TARGET.

    Attributes:
        rival: the better arm without sharing.
        upper: the upper end of the 95 % interval of ORACLE-loo's advantage over it, in percent.
    """

    rival: str
    upper: float

    @property
    def is_open(self) -> bool:
        """Whether the honest ceiling allows it."""
        return self.upper >= TARGET

    def __str__(self) -> str:
        """The decision in words."""
        start = (
            f"The upper bound of {HONEST} over {self.rival}, the better arm without sharing, is "
            f"{self.upper:+.2f} %: "
        )
        if self.is_open:
            return f"{start}{TARGET:g} % is not out of reach."
        return f"{start}no protocol of this shape can reach {TARGET:g} % on these tasks."


class Ceiling(NamedTuple):
    """The advantage of an oracle over an arm without sharing.

    Attributes:
        oracle, rival: the arms.
        values: d_s of each seed, in percent.
        interval: 95 % t-interval of their mean.
    """

    oracle: str
    rival: str
    values: tuple[float, ...]
    interval: tuple[float, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return sum(self.values) / len(self.values)


def better_rival(records: Sequence[Record]) -> str:
    """The arm without sharing whose prior tasks have the lower loss, over the seeds of both.

    Raises ConfigError if they have no seed in common.
    """
    one, other = (by_seed(records, name) for name in RIVALS)
    shared = [seed for seed in one if seed in other]
    if not shared:
        message = f"the ceiling needs runs of {' and '.join(RIVALS)} with the same seeds"
        raise ConfigError(message, field="runs", value="none", allowed="at least 2 seeds")
    losses = {}
    for name, arm in zip(RIVALS, (one, other), strict=True):
        losses[name] = sum(prior_loss(arm[seed]) for seed in shared)
    return min(losses, key=losses.__getitem__)


def ceilings(records: Sequence[Record]) -> list[Ceiling]:
    """The advantage of every oracle over every arm without sharing that has two seeds with it.

    Raises ConfigError if two runs are not paired.
    """
    found = []
    for oracle in ORACLES:
        for rival in RIVALS:
            d = advantages(by_seed(records, oracle), by_seed(records, rival))
            values = tuple(d.values())
            if len(values) > 1:
                found.append(Ceiling(oracle, rival, values, t_interval(values)))
    return found


def reach(records: Sequence[Record]) -> Reach | None:
    """What follows from the honest ceiling; None if it has fewer than two seeds.

    Raises ConfigError as `ceilings` and `better_rival`.
    """
    best = better_rival(records)
    for each in ceilings(records):
        if (each.oracle, each.rival) == (HONEST, best):
            return Reach(best, each.interval[1])
    return None


def ceiling_table(records: Sequence[Record]) -> str:
    """The advantages as Markdown, and the decision that follows from the honest one.

    Raises as `ceilings` and `better_rival`.
    """
    found = ceilings(records)
    if not found:
        return "The ceiling needs two seeds of an oracle and of an arm without sharing."
    lines = ["| oracle | against | seeds | d, % [95 %] |", "|---|---|---|---|"]
    for each in found:
        low, high = each.interval
        interval = f"{each.mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"| {each.oracle} | {each.rival} | {len(each.values)} | {interval} |")
    decision = reach(records) or f"Not decided: {HONEST} has fewer than two seeds with its rival."
    return "\n".join([*lines, "", str(decision)])
