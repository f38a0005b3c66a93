"""The records as plots: one SVG a figure. The same records and matplotlib give the same bytes.

matplotlib comes with the extra `train` and is imported only when something is drawn. The colours,
those of Okabe & Ito 2008 ("Color universal design") and one of Tol's, can be told apart by
colour-blind readers. Markers distinguish experiments.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from crma.core.errors import ConfigError
from crma.training.arms import ARMS
from crma.training.tables import CONTROL, DRIFT_MARGIN

STYLE = {
    "svg.hashsalt": "crma",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 10,
}
COLOURS = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#999999",
    "#CC79A7",
    "#882255",
    "#000000",
    "#E69F00",
    "#D55E00",
)
MARKERS = {"search": "x", "quick": "o", "full": "D"}  # by experiment
ADVANTAGE = 2.0  # percent, set before any run (crma/experiments/quick.toml)
WIDTH = 7.3  # inches; 700 pixels

Runs = dict[str, dict[str, Any]]  # run name -> record


class _Plot(NamedTuple):
    """A figure to draw: `draw` fills the axes of a figure that is `height` inches high."""

    name: str
    height: float
    draw: Callable[[Any], None]


def draw(results: Path, out: Path) -> None:
    """Draw every plot.

    Args:
        results: the folder of records, as `crma experiment` and `crma ablate --json` write them.
        out: the folder for the SVG files; created if missing.

    Raises:
        ConfigError: matplotlib is not installed, or `results` has no records of quick.toml.
    """
    matplotlib = _matplotlib()
    plots = _plots(results)
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for plot in plots:
            figure = matplotlib.figure.Figure((WIDTH, plot.height), layout="constrained")
            plot.draw(figure.subplots())
            figure.savefig(out / f"{plot.name}.svg", metadata={"Date": None, "Creator": None})


def _matplotlib() -> Any:
    """The matplotlib package. Raises ConfigError if it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        message = "plots need it: pip install 'crma-server[train]'"
        raise ConfigError(
            message, field="matplotlib", value="not installed", allowed="installed"
        ) from None
    return matplotlib


def _plots(results: Path) -> list[_Plot]:
    experiments = {name: _runs(results / name) for name in MARKERS}
    quick = experiments["quick"]
    if not quick:
        message = "no records in its folder quick"
        raise ConfigError(message, field="results", value=str(results), allowed="crma/results")
    plots = [
        _Plot("tradeoff", 4.2, partial(_tradeoff, experiments=experiments)),
        _Plot("drift", 1.0 + 0.18 * len(quick), partial(_drift, runs=quick)),
    ]
    for path in results.glob("*-ablation.json"):
        ablation = json.loads(path.read_text("utf-8"))
        height = 0.9 + 0.35 * len(ablation["variants"])
        plots.append(_Plot(path.stem, height, partial(_bars, ablation=ablation)))
    return plots


def _runs(folder: Path) -> Runs:
    """The runs with prior tasks, ordered by arm, label and seed; empty without the folder."""
    records = {
        path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*-seed*.json")
    }

    def place(name: str) -> tuple[int, str, int]:
        record = records[name]
        label = name.rpartition("-seed")[0]
        return _arm_number(record), label, record["seed"]

    ordered = sorted(records, key=place)
    return {name: records[name] for name in ordered if records[name]["mean_drift"] is not None}


def _arm_number(record: Mapping[str, Any]) -> int:
    return list(ARMS).index(record["arm"])


def _drift(axes: Any, runs: Runs) -> None:
    """One row for each run: a point for each prior task and a bar at their mean."""
    tasks = sorted({task for run in runs.values() for task in run["order"]})
    colours = dict(zip(tasks, COLOURS[::2], strict=False))
    for row, run in enumerate(runs.values()):
        axes.plot(run["mean_drift"], row, "|", color="black", ms=11, label="mean")
        for task, drift in zip(run["order"][:-1], run["drift"][:-1], strict=True):
            axes.plot(drift, row, "o", color=colours[task], ms=4.5, alpha=0.8, label=task)
    axes.axvspan(-DRIFT_MARGIN, DRIFT_MARGIN, color="0.9", lw=0, zorder=0)
    axes.set_xscale("symlog", linthresh=1, linscale=2)
    ticks = (-10, -1, -0.5, 0, 0.5, 1, 10, 100, 1000)
    axes.set_xticks(ticks, ticks)
    labels = [name.replace("-seed", "  seed ") for name in runs]
    axes.set_yticks(range(len(runs)), labels)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlabel("drift of prior tasks, % (logarithmic beyond ±1; grey: ±0.5)")
    axes.legend(handles=_one_line_a_label(axes))


def _tradeoff(axes: Any, experiments: dict[str, Runs]) -> None:
    """One point for each run: its mean drift against its advantage over the control."""
    for experiment, runs in experiments.items():
        for run in runs.values():
            axes.plot(
                run["mean_drift"],
                _advantage(run, runs),
                MARKERS[experiment],
                color=COLOURS[_arm_number(run)],
                label=f"{run['arm']}, {experiment}",
            )
    axes.set_xscale("symlog", linthresh=1, linscale=2)
    axes.set_yscale("symlog", linthresh=20, linscale=2)
    x_ticks = (-1, -0.5, 0, 0.5, 1, 10, 100, 1000)
    y_ticks = (20, 10, 2, 0, -10, -20, -100, -1000)
    axes.set_xticks(x_ticks, x_ticks)
    axes.set_yticks(y_ticks, y_ticks)
    axes.fill_between([-DRIFT_MARGIN, DRIFT_MARGIN], ADVANTAGE, 60, color="0.9", lw=0, zorder=0)
    axes.text(0, 50, "target", ha="center", va="top")
    axes.set_ylim(None, 60)
    axes.set_xlabel("mean drift of prior tasks, % (search: on validation data)")
    axes.set_ylabel(f"final loss below that of {CONTROL}, %")
    axes.legend(handles=_one_line_a_label(axes), loc="upper right")


def _advantage(run: Mapping[str, Any], runs: Runs) -> float:
    """Final loss below that of the best control at the same seed, in percent; NaN without one."""
    controls = [
        other["mean_loss"]
        for other in runs.values()
        if other["arm"] == CONTROL and other["seed"] == run["seed"]
    ]
    best = min(controls, default=float("nan"))
    return 100 * (1 - run["mean_loss"] / best)


def _bars(axes: Any, ablation: dict[str, Any]) -> None:
    """The accuracy of every variant of an ablation with its Wilson interval."""
    scored = {label: cell for label, cell in ablation["variants"].items() if cell["scored"]}
    for label in sorted(scored, key=lambda label: scored[label]["accuracy"]):
        cell = scored[label]
        axes.barh(label, cell["accuracy"], 0.6, color=COLOURS[0])
        axes.plot(cell["wilson"], [label, label], color="black", lw=1.5, marker="|")
        counts = f"{cell['correct']} of {cell['scored']}"
        axes.text(cell["wilson"][1] + 0.015, label, counts, va="center")
    axes.set_xlim(0, 1.1)
    axes.set_title(f"accuracy ({ablation['scorer']}) with 95 % Wilson intervals")


def _one_line_a_label(axes: Any) -> list[Any]:
    """Handles for a legend that names every label once."""
    return list({line.get_label(): line for line in axes.lines}.values())
