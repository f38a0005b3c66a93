"""The records as plots: one SVG a figure, the same bytes for the same records and the same matplotlib.

matplotlib comes with the extra `train` and is imported here only. Colours: Okabe & Ito 2008 ("Color universal design")
and one of Tol's, told apart by colour-blind eyes as well; the marker tells experiments apart.
"""

import json
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError
from crma.training.arms import ARMS
from crma.training.tables import CONTROL, DRIFT_MARGIN

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError:
    message = "plots need it: pip install 'crma-server[train]'"
    raise ConfigError(
        message, field="matplotlib", value="not installed", allowed="installed"
    ) from None

STYLE: Any = {
    "svg.hashsalt": "crma",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
}
STYLE |= {
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
EXPERIMENTS = {"search": "x", "quick": "o", "full": "D"}
ADVANTAGE = 2.0  # percent, set before any run (crma/experiments/quick.toml)

Runs = dict[str, dict[str, Any]]


def draw(results: Path, out: Path) -> None:
    """Every plot into `out`, 700 pixels wide. Raises ConfigError where `results` has no records of quick.toml."""
    runs = {name: _runs(results / name) for name in EXPERIMENTS}
    quick = runs["quick"]
    if not quick:
        raise ConfigError(
            "no records in its folder quick",
            field="results",
            value=str(results),
            allowed="crma/results",
        )
    plots: dict[str, Any] = {"tradeoff": (_tradeoff, 4.2, runs)}
    for path in results.glob("*-ablation.json"):
        found = json.loads(path.read_text("utf-8"))
        plots[path.stem] = (_bars, 0.9 + 0.35 * len(found["variants"]), found)
    plots["drift"] = (_drift, 1.0 + 0.18 * len(quick), quick)
    out.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name, (plot, height, records) in plots.items():
            figure = Figure((7.3, height), layout="constrained")
            plot(figure.subplots(), records)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _runs(folder: Path) -> Runs:
    """Run -> record of those with prior tasks, arm after arm, by label and seed; none where there is no folder."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*-seed*.json")}
    place = {
        n: (list(ARMS).index(r["arm"]), n.rpartition("-seed")[0], r["seed"])
        for n, r in found.items()
    }
    return {
        n: found[n]
        for n in sorted(found, key=place.__getitem__)
        if found[n]["mean_drift"] is not None
    }


def _drift(axes: Any, runs: Runs) -> None:
    """A row a run: a point for each prior task, a bar at their mean."""
    colours = dict(
        zip(
            sorted({task for run in runs.values() for task in run["order"]}),
            COLOURS[::2],
            strict=False,
        )
    )
    for row, run in enumerate(runs.values()):
        axes.plot(run["mean_drift"], row, "|", color="black", ms=11, label="mean")
        for task, drift in zip(run["order"][:-1], run["drift"][:-1], strict=True):
            axes.plot(drift, row, "o", color=colours[task], ms=4.5, alpha=0.8, label=task)
    axes.axvspan(-DRIFT_MARGIN, DRIFT_MARGIN, color="0.9", lw=0, zorder=0)
    axes.set_xscale("symlog", linthresh=1, linscale=2)
    axes.set_xticks(ticks := (-10, -1, -0.5, 0, 0.5, 1, 10, 100, 1000), ticks)
    axes.set_yticks(range(len(runs)), [name.replace("-seed", "  seed ") for name in runs])
    axes.set(
        ylim=(len(runs) - 0.5, -0.5),
        xlabel="drift of prior tasks, % (logarithmic beyond ±1; grey: ±0.5)",
    )
    axes.legend(handles=list({line.get_label(): line for line in axes.lines}.values()))


def _tradeoff(axes: Any, experiments: dict[str, Runs]) -> None:
    """A point a run: mean drift against the advantage over the best CONTROL of the same experiment and seed."""
    for experiment, run in (
        (name, run) for name, runs in experiments.items() for run in runs.values()
    ):
        rivals = [
            r
            for r in experiments[experiment].values()
            if (r["arm"], r["seed"]) == (CONTROL, run["seed"])
        ]
        gain = 100 * (
            1 - run["mean_loss"] / min((r["mean_loss"] for r in rivals), default=float("nan"))
        )
        style = {
            "color": COLOURS[list(ARMS).index(run["arm"])],
            "label": f"{run['arm']}, {experiment}",
        }
        axes.plot(run["mean_drift"], gain, EXPERIMENTS[experiment], **style)
    axes.set_xscale("symlog", linthresh=1, linscale=2)
    axes.set_yscale("symlog", linthresh=20, linscale=2)
    axes.set_xticks(x := (-1, -0.5, 0, 0.5, 1, 10, 100, 1000), x)
    axes.set_yticks(y := (20, 10, 2, 0, -10, -20, -100, -1000), y)
    axes.fill_between([-DRIFT_MARGIN, DRIFT_MARGIN], ADVANTAGE, 60, color="0.9", lw=0, zorder=0)
    axes.text(0, 50, "target", ha="center", va="top")
    axes.set(xlabel="mean drift of prior tasks, % (search: on validation data)", ylim=(None, 60))
    axes.set(ylabel=f"final loss below that of {CONTROL}, %")
    axes.legend(
        handles=list({line.get_label(): line for line in axes.lines}.values()), loc="upper right"
    )


def _bars(axes: Any, ablation: dict[str, Any]) -> None:
    """Accuracy of every variant of an ablation (`crma ablate --json`) with its Wilson interval."""
    found = [(label, cell) for label, cell in ablation["variants"].items() if cell["scored"]]
    for variant, cell in sorted(found, key=lambda item: item[1]["accuracy"]):
        axes.barh(variant, cell["accuracy"], 0.6, color=COLOURS[0])
        axes.plot(cell["wilson"], [variant, variant], color="black", lw=1.5, marker="|")
        axes.text(
            cell["wilson"][1] + 0.015,
            variant,
            f"{cell['correct']} of {cell['scored']}",
            va="center",
        )
    axes.set(xlim=(0, 1.1), title=f"accuracy ({ablation['scorer']}) with 95 % Wilson intervals")
