"""What is printed of an experiment: the table of its arms, and what it was made to find out."""

from collections.abc import Mapping

from crma.training.ceiling import ceiling_table
from crma.training.endpoint import endpoint_table
from crma.training.experiment import Experiment
from crma.training.mixed_effects import mixed_effects_line
from crma.training.pairing import Record
from crma.training.regime import regime_table
from crma.training.tables import arms_table


def experiment_report(experiment: Experiment, records: Mapping[str, Record]) -> str:
    """The tables of an experiment, as Markdown.

    Args:
        experiment: as it was read.
        records: "<label>-seed<n>" -> record, of those of its runs that were made.

    Raises:
        ConfigError: runs that are compared are not paired, or not of the endpoint.
    """
    made = list(records.values())
    parts = [arms_table(records)]
    if made and experiment.report == "regime":
        parts.append(regime_table(made))
    if made and experiment.report == "ceiling":
        parts.append(ceiling_table(made))
    endpoint = experiment.judged_by()
    if endpoint is not None:
        parts += [endpoint_table(endpoint, made), mixed_effects_line(endpoint, made)]
    return "\n\n".join(part for part in parts if part)
