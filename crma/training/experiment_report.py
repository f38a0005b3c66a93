"""What is printed of an experiment: the table of its arms, and what it was made to find out."""

from collections.abc import Mapping

from crma.training.ceiling import ceiling_table
from crma.training.continual import continual_table
from crma.training.endpoint import endpoint_table, missing
from crma.training.experiment import Experiment
from crma.training.mixed_effects import mixed_effects_line
from crma.training.pairing import Record
from crma.training.regime import regime_table
from crma.training.screening import (
    interval_cell,
    of_labels,
    paired_advantages,
    screening_table,
)
from crma.training.tables import arms_table

BESIDE = ("winner_M=I", "winner_free-M", "best-rival")  # roles that the endpoint does not judge


def experiment_report(experiment: Experiment, records: Mapping[str, Record]) -> str:
    """The tables of an experiment, as Markdown.

    Of one that an endpoint judges, nothing but the number of missing runs until all are there:
    nobody looks before.

    Args:
        experiment: as it was read.
        records: "<label>-seed<n>" -> record, of those of its runs that were made.

    Raises:
        ConfigError: runs that are compared are not paired, or not of the endpoint.
    """
    endpoint = experiment.judged_by() if experiment.report == "endpoint" else None
    made = list(records.values())
    if endpoint is not None and missing(endpoint, made):
        return endpoint_table(endpoint, made)
    # The grid of a regime says all that a table of its arms would.
    arms = "" if experiment.report == "regime" else arms_table(records)
    return "\n\n".join(part for part in [arms, *_found(experiment, records)] if part)


def _found(experiment: Experiment, records: Mapping[str, Record]) -> list[str]:
    """What an experiment was made to find out; nothing while it has no record."""
    made = list(records.values())
    if not made:
        return []
    if experiment.report == "regime":
        return [regime_table(made)]
    if experiment.report == "ceiling":
        return [ceiling_table(made)]
    if experiment.report == "screening":
        return [screening_table(experiment, records)]
    if experiment.report == "continual":
        return [continual_table(records)]
    endpoint = experiment.judged_by()
    if experiment.report != "endpoint" or endpoint is None:
        return []
    verdict = [endpoint_table(endpoint, made), mixed_effects_line(endpoint, made)]
    return [*verdict, _beside(experiment, records)]


def _beside(experiment: Experiment, records: Mapping[str, Record]) -> str:
    """The winner against arms that the endpoint does not judge; empty without any."""
    others = [runs.name for runs in experiment.runs if runs.role in BESIDE]
    if not others:
        return ""
    by_label = of_labels(records)
    (winner,) = [runs.name for runs in experiment.runs if runs.role == "winner"]
    lines = ["| beside the endpoint | seeds | d, % [95 %] |", "|---|---|---|"]
    for label in others:
        d = paired_advantages(by_label[winner], by_label.get(label, {}))
        lines.append(f"| {label} | {len(d)} | {interval_cell(d)} |")
    return "\n".join(lines)
