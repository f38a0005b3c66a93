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
ORACLES = ("ORACLE-loo", "ORACLE")
RIVALS = ("PRIVATE", "FROZEN-matched")


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
    return "\n".join([*lines, "", _decision(records, found)])


def _decision(records: Sequence[Record], found: Sequence[Ceiling]) -> str:
    honest, best = ORACLES[0], better_rival(records)
    for each in found:
        if (each.oracle, each.rival) != (honest, best):
            continue
        upper = each.interval[1]
        if upper < TARGET:
            return (
                f"The upper bound of {honest} over {best}, the better arm without sharing, is "
                f"{upper:+.2f} %: no protocol of this shape can reach {TARGET:g} % on these tasks."
            )
        return (
            f"The upper bound of {honest} over {best}, the better arm without sharing, is "
            f"{upper:+.2f} %: {TARGET:g} % is not out of reach."
        )
    return f"Not decided: {honest} and {best} have fewer than two seeds in common."
