"""The records of an experiment as the table that `crma experiment` prints and the README shows."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from crma.evaluation.statistics import t_interval, tost

CONTROL = "FROZEN-matched"
FIGURES = ("ACC", "BWT", "FWT")
DRIFT_MARGIN = 0.5  # percent, set before any run (METHOD, section 4)


def arms_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The records of an experiment, "<label>-seed<n>" -> record, a row a label: figures are means over its seeds.

    Drift is that of prior tasks, in percent; the advantage is by how much the mean final loss lies below that of
    FROZEN-matched at the same seed, in percent.
    """
    labels: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, record in records.items():
        labels[name.rpartition("-seed")[0]].append(record)
    control = {record["seed"]: record["mean_loss"] for record in labels.get(CONTROL, [])}
    lines = [
        "| arm | seeds | mean drift, % | worst task | TOST ±0.5 % | final loss | advantage, % | ACC | BWT | FWT |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, runs in labels.items():
        drifts = [run["mean_drift"] for run in runs if run["mean_drift"] is not None]
        gains = [
            100 * (1 - run["mean_loss"] / control[run["seed"]])
            for run in runs
            if run["seed"] in control
        ]
        cells = [label, ", ".join(str(run["seed"]) for run in runs), _over_seeds(drifts, "+.2f")]
        cells += [f"{max(max(run['drift'][:-1]) for run in runs):+.2f}" if drifts else "–"]
        cells += [f"{tost(drifts, margin=DRIFT_MARGIN):.2g}" if len(drifts) > 1 else "–"]
        cells += [
            _over_seeds([run["mean_loss"] for run in runs], ".4f"),
            _over_seeds(gains, "+.1f"),
        ]
        cells += [
            _over_seeds([run[name] for run in runs if run[name] is not None], ".3f")
            for name in FIGURES
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_seeds(values: Sequence[float], form: str) -> str:
    """The mean; of several seeds with its 95 % t-interval and every value."""
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{form}}"
    low, high = t_interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]<br>({', '.join(f'{value:{form}}' for value in values)})"
