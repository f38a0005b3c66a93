"""What a study found so far, and what is still to do, as Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from crma.core.errors import DataError
from crma.training.cost import Cost, estimate
from crma.training.decision import FILE
from crma.training.experiment_report import experiment_report
from crma.training.pairing import Record
from crma.training.study import Study
from crma.training.study_run import Step, walk

HEADER = ("phase", "runs", "missing", "examples", "time", "state")
BACKBONE = ("max_norm", "max_bound", "max_movement")  # of a certificate


def study_report(study: Study, results: Path, *, regardless: bool = False) -> str:
    """The phases that have records, with their tables, and why others did not run.

    Raises ConfigError and TrainingError as `walk`.
    """
    parts = []
    for step in walk(study, results, regardless=regardless):
        if step.why_not:
            parts.append(f"### {step.phase.name}\n\nNot run: {step.why_not}")
            continue
        records = _records(step)
        if records:
            parts.append(
                "\n\n".join([f"### {step.phase.name}", *_of_phase(step, records, results)])
            )
    return "\n\n".join(parts) or "No run of this study has been made yet."


def _of_phase(step: Step, records: Mapping[str, Record], results: Path) -> list[str]:
    found = [_provenance(step, list(records.values())), experiment_report(step.experiment, records)]
    backbone = _backbone(step, records)
    decision = results / step.phase.name / FILE
    if decision.exists():
        words = json.loads(decision.read_text("utf-8"))["in_words"]
        found.append(f"Decided: {words}")
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
    largest = [f"{key} {max(each[key] for each in found):.4f}" for key in BACKBONE]
    holds = sum(each["holds"] for each in found)
    return (
        f"Certificate of {winners[0]}: holds in {holds} of {len(found)} runs; largest over seeds: "
        f"{', '.join(largest)}."
    )


def forecast(study: Study, results: Path, *, regardless: bool) -> list[tuple[str, ...]]:
    """A row for each phase: its name, how many runs it has and how many are missing, the time that
    they take one after the other, and what is known about it.

    Raises ConfigError and TrainingError as `walk`.
    """
    rows: list[tuple[str, ...]] = [HEADER]
    for step in walk(study, results, regardless=regardless):
        if step.why_not:
            rows.append((step.phase.name, "", "", "", "", f"not run: {step.why_not}"))
            continue
        rows.append(_row(step, results))
    return rows


def _row(step: Step, results: Path) -> tuple[str, ...]:
    runs = step.runs
    known = "ready" if runs.missing else "done"
    if step.waits_for:
        known = f"waits for {', '.join(step.waits_for)}"
    if step.phase.extends in step.waits_for:
        known += ", and runs only if that takes nothing"
    counted = (step.phase.name, str(len(runs.configs)), str(len(runs.missing)))
    try:
        cost = estimate([runs.configs[name] for name in runs.missing], results)
    except DataError as error:
        return (*counted, "", "", f"{known}; {error.message}")
    return (*counted, str(cost.examples), _time(cost), known)


def _time(cost: Cost) -> str:
    if cost.seconds is None:
        return "unknown"
    return f"{cost.seconds / 3600:.1f} h on {cost.machine}"


def _records(step: Step) -> dict[str, Record]:
    return {
        name: json.loads(path.read_text("utf-8"))
        for name, path in step.runs.paths.items()
        if path.exists()
    }


def _listed(values: set[str]) -> str:
    return ", ".join(sorted(values))
