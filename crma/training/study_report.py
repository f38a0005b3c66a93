"""What a study found so far, and what is still to do, as Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from crma.core.errors import DataError
from crma.training.cost import Cost, estimate
from crma.training.decision import FILE
from crma.training.experiment_report import experiment_report
from crma.training.pairing import Record
from crma.training.study import Study
from crma.training.study_run import Step, walk

BACKBONE = ("max_norm", "max_bound", "max_movement")  # of a certificate


def study_report(study: Study, results: Path) -> str:
    """The phases that have records, with their tables, and why others do not run.

    Raises ConfigError and TrainingError as `walk`.
    """
    parts = []
    steps = list(walk(study, results, regardless=False))
    made = {step.phase.name: _records(step) for step in steps}
    went_on = {
        step.phase.extends for step in steps if len(made[step.phase.name]) == len(step.runs.paths)
    }
    for step in steps:
        records = made[step.phase.name]
        said = [f"### {step.phase.name}"]
        if step.why_not:
            said.append(f"{'Run regardless' if records else 'Not run'}: {step.why_not}")
        if records:
            extended = made.get(step.phase.extends, {})
            with_tables = step.phase.name not in went_on
            said += _of_phase(step, records, extended, results, with_tables=with_tables)
        if len(said) > 1:
            parts.append("\n\n".join(said))
    return "\n\n".join(parts) or "No run of this study has been made yet."


def _of_phase(
    step: Step,
    records: Mapping[str, Record],
    extended: Mapping[str, Record],
    results: Path,
    *,
    with_tables: bool,
) -> list[str]:
    """What the runs of a phase were, and once all are there, its tables.

    Those of a phase that extends another one are of the records of both, so the other then has
    none.
    """
    provenance = _provenance(step, list(records.values()))
    if len(records) < len(step.runs.paths):
        return [provenance]
    tables = ""
    if with_tables:
        tables = experiment_report(step.experiment, {**extended, **records})
    found = [part for part in (provenance, tables) if part]
    decision = results / step.phase.name / FILE
    if decision.exists():
        words = json.loads(decision.read_text("utf-8"))["in_words"]
        found += [] if words in tables else [words]
    backbone = _backbone(step, records)
    return [*found, backbone] if backbone else found


def _provenance(step: Step, made: Sequence[Record]) -> str:
    """How many runs, on what, how long, and of which commits."""
    seeds = sorted({record["seed"] for record in made})
    machines = {record["hardware"]["gpu"] or record["hardware"]["cpu"] for record in made}
    dtypes = {record["pairing"]["dtype"] for record in made}
    hours = sum(record["wall_s"] for record in made) / 3600
    commits = {record["commit"] for record in made}
    return (
        f"{len(made)} of {len(step.runs.configs)} runs; seeds {seeds[0]} to {seeds[-1]}; "
        f"{_listed(dtypes)} on {_listed(machines)}; {hours:.1f} h, one after the other; commit "
        f"{_listed(commits)}; endpoint `{_listed({record['endpoint'] for record in made})}`."
    )


def _backbone(step: Step, records: Mapping[str, Record]) -> str:
    """The certificate of the winner's backbones: the largest figures over seeds; may be empty."""
    winners = [runs.name for runs in step.experiment.runs if runs.role == "winner"]
    found = [
        record["certificate"]
        for name, record in records.items()
        if name.rpartition("-seed")[0] in winners
    ]
    if not found:
        return ""
    largest = []
    for key in BACKBONE:
        highest = max(each[key] for each in found)
        largest.append(f"{key} {highest:.4f}")
    holds = sum(each["holds"] for each in found)
    return (
        f"Certificate of {winners[0]}: holds in {holds} of {len(found)} runs; largest over seeds: "
        f"{', '.join(largest)}."
    )


class Forecast(NamedTuple):
    """What is to do in a phase.

    Attributes:
        phase: its name.
        runs: how many it has; 0 if it does not run.
        missing: those without a record.
        cost: of the missing runs, one after the other; None if the data is not there to count.
        state: in words.
    """

    phase: str
    runs: int
    missing: int
    cost: Cost | None
    state: str

    def row(self) -> tuple[str, ...]:
        """As a line of a table has it."""
        time = "unknown"
        if self.cost is not None and self.cost.seconds is not None:
            time = f"{self.cost.seconds / 3600:.1f} h"
        return self.phase, str(self.runs), str(self.missing), time, self.state


def forecast(study: Study, results: Path, *, regardless: bool) -> list[Forecast]:
    """What is to do in each phase, by what is decided so far.

    Raises ConfigError and TrainingError as `walk`.
    """
    steps = walk(study, results, regardless=regardless)
    return [_forecast(step, results) for step in steps]


def _forecast(step: Step, results: Path) -> Forecast:
    runs, name = step.runs, step.phase.name
    if step.why_not:
        return Forecast(name, 0, 0, estimate([], results), f"not run: {step.why_not}")
    state = "ready" if runs.missing else "done"
    if step.waits_for:
        state = f"waits for {', '.join(step.waits_for)}"
    if step.phase.extends in step.waits_for:
        state += ", and runs only if that takes nothing"
    try:
        cost = estimate([runs.configs[each] for each in runs.missing], results)
    except DataError as error:
        return Forecast(name, len(runs.configs), len(runs.missing), None, f"{state}; {error}")
    return Forecast(name, len(runs.configs), len(runs.missing), cost, state)


def _records(step: Step) -> dict[str, Record]:
    return {
        name: json.loads(path.read_text("utf-8"))
        for name, path in step.runs.paths.items()
        if path.exists()
    }


def _listed(values: set[str]) -> str:
    return ", ".join(sorted(values))
