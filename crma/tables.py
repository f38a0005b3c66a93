"""Results as the Markdown that the README shows; a test holds the README to it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from crma.statistics import t_interval, tost

CONTROL = "FROZEN-matched"
FIGURES = ("ACC", "BWT", "FWT")
DRIFT_MARGIN = 0.5  # percent, set before any run (METHOD, section 4)

COLUMNS = {
    "task+crma": "LoRA + CRMA",
    "task": "same LoRA, CRMA off",
    "crma": "CRMA alone",
    "base": "base",
    "control": "LoRA without CRMA",
    "naive_bayes": "naive Bayes",
    "majority": "majority",
}


def results_table(result: Mapping[str, Any]) -> str:
    """What `crma evaluate --json` gave: accuracy with its 95 % interval, and loss where there is one."""
    tasks: Mapping[str, Mapping[str, Any]] = result["tasks"]
    columns = [column for column in COLUMNS if column in next(iter(tasks.values()))]
    lines = [
        "| " + " | ".join([f"{result['split']}", *(COLUMNS[column] for column in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
        *("| " + " | ".join([task, *(_cell(row[column]) for column in columns)]) + " |" for task, row in tasks.items()),
    ]
    items = next(iter(tasks.values()))[columns[0]]["items"]
    machine = result["hardware"]
    origin = (
        f"Exact-match accuracy on {items} questions a task [95 %, Wilson], with the loss in nats per answer token. "
        f"{result['model']}, {result['dtype']}, greedy; seed {result['seed']}, one run; {machine['cores']} cores of "
        f"{machine['cpu']}; commit `{result['commit']}`."
    )
    return "\n".join([*lines, "", origin])


def _cell(cell: Mapping[str, Any]) -> str:
    low, high = cell["wilson"]
    loss = f"<br>{cell['loss']:.2f}" if "loss" in cell else ""
    return f"{cell['accuracy']:.2f} [{low:.2f}, {high:.2f}]{loss}"


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
        gains = [100 * (1 - run["mean_loss"] / control[run["seed"]]) for run in runs if run["seed"] in control]
        cells = [label, ", ".join(str(run["seed"]) for run in runs), _over_seeds(drifts, "+.2f")]
        cells += [f"{max(max(run['drift'][:-1]) for run in runs):+.2f}" if drifts else "–"]
        cells += [f"{tost(drifts, margin=DRIFT_MARGIN):.2g}" if len(drifts) > 1 else "–"]
        cells += [_over_seeds([run["mean_loss"] for run in runs], ".4f"), _over_seeds(gains, "+.1f")]
        cells += [_over_seeds([run[name] for run in runs if run[name] is not None], ".3f") for name in FIGURES]
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
