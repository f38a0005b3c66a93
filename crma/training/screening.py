"""The screening: which candidate goes into the confirmation, and which rival it has to beat.

The rule, stated before the runs: of the candidates whose mean drift over seeds is within
MAX_DRIFT of 0, the one with the lowest loss of prior tasks. The best rival is the one with the
lowest loss of prior tasks; rivals have no drift by construction. Losses are summed over the seeds
that all candidates and rivals have.

An experiment says which of its runs are candidates and rivals (`experiment.Runs.role`).
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from crma.core.errors import ConfigError
from crma.evaluation.statistics import t_interval
from crma.training.endpoint import advantage, prior_loss
from crma.training.experiment import Experiment
from crma.training.pairing import Record, check_paired

MAX_DRIFT = 0.5  # percent, of the mean over prior tasks and seeds

ByLabel = dict[str, dict[int, Record]]  # label -> seed -> record


class Screened(NamedTuple):
    """The runs of one label.

    Attributes:
        label: of the runs.
        role: of the runs.
        loss: of prior tasks, summed over tasks and seeds.
        drift: mean over prior tasks and seeds, in percent.
    """

    label: str
    role: str
    loss: float
    drift: float

    @property
    def may_win(self) -> bool:
        """Whether it is a candidate that stands still enough."""
        return self.role == "candidate" and abs(self.drift) <= MAX_DRIFT


class Screening(NamedTuple):
    """What a screening takes.

    Attributes:
        winner: the label of the candidate; None if all drift too far.
        rival: the label of the best rival.
    """

    winner: str | None
    rival: str

    def __str__(self) -> str:
        """The decision in words."""
        rival = f"The best rival is {self.rival}."
        if self.winner is None:
            return f"No candidate drifts by at most {MAX_DRIFT:g} %: there is no winner. {rival}"
        return f"Taken: {self.winner}. {rival}"


def screened(experiment: Experiment, records: Mapping[str, Record]) -> list[Screened]:
    """The candidates and rivals of an experiment, the lowest loss first.

    Args:
        experiment: says which labels are candidates and rivals.
        records: "<label>-seed<n>" -> record.

    Raises:
        ConfigError: they have no seed in common, or two of their runs are not paired.
    """
    roles = {runs.name: runs.role for runs in experiment.runs if runs.role}
    by_label = of_labels(records)
    seeds = _common_seeds([by_label.get(label, {}) for label in roles])
    _check_paired(by_label, list(roles), seeds)
    found = []
    for label, role in roles.items():
        runs = [by_label[label][seed] for seed in seeds]
        drift = mean(run["mean_drift"] for run in runs)
        found.append(Screened(label, role, sum(map(prior_loss, runs)), drift))
    return sorted(found, key=lambda each: (each.loss, each.label))


def choose(found: Sequence[Screened]) -> Screening:
    """What the rule takes. Raises ConfigError if there is no rival."""
    rivals = [each.label for each in found if each.role == "rival"]
    winners = [each.label for each in found if each.may_win]
    if not rivals:
        message = "a screening needs a rival"
        raise ConfigError(message, field="role", value="none", allowed='runs with role = "rival"')
    return Screening(winners[0] if winners else None, rivals[0])


def screening_table(experiment: Experiment, records: Mapping[str, Record]) -> str:
    """Candidates and rivals against the best rival, as Markdown, and what the rule takes.

    While runs are missing, only that. Raises ConfigError as `screened` and `choose`.
    """
    if set(experiment.planned()) - set(records):
        return "The screening is decided when all of its runs are there."
    found = screened(experiment, records)
    taken = choose(found)
    by_label = of_labels(records)
    lines = [
        "| candidate or rival | role | seeds | d over the best rival, % [95 %] | mean drift, % |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        d = paired_advantages(by_label[each.label], by_label[taken.rival])
        drift = f"{each.drift:+.2f}"
        lines.append(f"| {each.label} | {each.role} | {len(d)} | {interval_cell(d)} | {drift} |")
    return "\n".join([*lines, "", str(taken)])


def paired_advantages(runs: Mapping[int, Record], base: Mapping[int, Record]) -> list[float]:
    """d of every seed that two labels share, in percent. Raises ConfigError if one is no pair."""
    return [advantage(runs[seed], base[seed]) for seed in runs if seed in base]


def interval_cell(d: Sequence[float]) -> str:
    """The mean and its 95 % t-interval, for a table; the mean alone of one seed."""
    if not d:
        return "–"
    if len(d) == 1:
        return f"{d[0]:+.2f}"
    low, high = t_interval(d)
    return f"{mean(d):+.2f} [{low:+.2f}, {high:+.2f}]"


def of_labels(records: Mapping[str, Record]) -> ByLabel:
    """The records of an experiment by label and seed."""
    found: ByLabel = {}
    for name, record in records.items():
        label = name.rpartition("-seed")[0]
        found.setdefault(label, {})[record["seed"]] = record
    return found


def _common_seeds(runs: Sequence[Mapping[int, Record]]) -> list[int]:
    """The seeds that all labels have. Raises ConfigError if there are none."""
    common = set.intersection(*(set(each) for each in runs)) if runs else set()
    if not common:
        message = "candidates and rivals have no seed in common"
        raise ConfigError(message, field="runs", value="none", allowed="at least 1 seed")
    return sorted(common)


def _check_paired(by_label: ByLabel, labels: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ConfigError if two runs of a seed differ in more than the arm."""
    first, *others = labels
    for label in others:
        for seed in seeds:
            check_paired(by_label[label][seed], by_label[first][seed])
