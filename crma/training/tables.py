"""The table of an experiment's records that `crma experiment` prints and the documents show."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from crma.evaluation.statistics import t_interval, tost
from crma.training.pairing import Record, is_paired

CONTROL = "FROZEN-matched"
DRIFT_MARGIN = 0.5  # percent, set before any run (docs/method.md, section 4)
_HEADER = (
    "| arm | seeds | mean drift, % | worst task | TOST ±0.5 % | final loss | advantage, % "
    "| ACC | BWT | FWT |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
_FIGURES = ("ACC", "BWT", "FWT")
_NOTHING = "–"


def arms_table(records: Mapping[str, Record]) -> str:
    """A Markdown table with one row for each label; figures are means over its seeds.

    Drift is that of prior tasks, in percent. The advantage says how far the mean final loss lies
    below that of FROZEN-matched at the same seed, in percent; of new records only if the two runs
    are paired.

    Args:
        records: "<label>-seed<n>" -> the record of that run.
    """
    by_label: dict[str, list[Record]] = defaultdict(list)
    for name, record in records.items():
        label = name.rpartition("-seed")[0]
        by_label[label].append(record)
    controls = {record["seed"]: record for record in by_label.get(CONTROL, [])}
    rows = [_row(label, runs, controls) for label, runs in by_label.items()]
    return "\n".join([*_HEADER, *rows])


def _row(label: str, runs: Sequence[Record], controls: Mapping[int, Record]) -> str:
    drifts = _known(runs, "mean_drift")
    figures = [_over_seeds(_known(runs, name), ".3f") for name in _FIGURES]
    cells = [
        label,
        ", ".join(str(run["seed"]) for run in runs),
        _over_seeds(drifts, "+.2f"),
        _worst_task(runs) if drifts else _NOTHING,
        f"{tost(drifts, margin=DRIFT_MARGIN):.2g}" if len(drifts) > 1 else _NOTHING,
        _over_seeds(_known(runs, "mean_loss"), ".4f"),
        _over_seeds(_advantages(runs, controls), "+.1f"),
        *figures,
    ]
    return f"| {' | '.join(cells)} |"


def _known(runs: Sequence[Record], name: str) -> list[float]:
    """The values of one figure, without those that are None because nothing was sequential."""
    return [run[name] for run in runs if run[name] is not None]


def _worst_task(runs: Sequence[Record]) -> str:
    """The largest drift of any prior task at any seed; the last task has none."""
    worst = max(max(run["drift"][:-1]) for run in runs)
    return f"{worst:+.2f}"


def _advantages(runs: Sequence[Record], controls: Mapping[int, Record]) -> list[float]:
    """In percent, of the seeds at which a control was run that it can be compared with."""
    found = []
    for run in runs:
        control = controls.get(run["seed"])
        if control is not None and _is_comparable(run, control):
            found.append(100 * (1 - run["mean_loss"] / control["mean_loss"]))
    return found


def _is_comparable(run: Record, control: Record) -> bool:
    """Records from before pairing was recorded are compared as they were published."""
    return "pairing" not in run or is_paired(control, run)


def _over_seeds(values: Sequence[float], form: str) -> str:
    """The mean; with several seeds, also its 95 % t-interval and every value."""
    if not values:
        return _NOTHING
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:{form}}"
    low, high = t_interval(values)
    every = ", ".join(f"{value:{form}}" for value in values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]<br>({every})"
