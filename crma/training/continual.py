"""How well arms learn task after task: the usual figures, and the loss against two of them."""

from collections.abc import Mapping, Sequence
from statistics import mean

from crma.training.pairing import Record
from crma.training.screening import interval_cell, of_labels, paired_advantages

BASES = ("PRIVATE", "FROZEN-matched")
FIGURES = ("ACC", "BWT", "forgetting")


def continual_table(records: Mapping[str, Record]) -> str:
    """Accuracy, transfer, forgetting, and d over the arms without sharing, as Markdown.

    Figures are means over seeds; d has its 95 % t-interval.

    Args:
        records: "<label>-seed<n>" -> record; arms that are compared must be paired.

    Raises:
        ConfigError: two runs are not paired.
    """
    heads = [f"d over {base}, %" for base in BASES]
    lines = [
        f"| {' | '.join(['arm', 'seeds', *FIGURES, *heads])} |",
        f"|{'---|' * (2 + len(FIGURES) + len(heads))}",
    ]
    by_label = of_labels(records)
    for label, runs in by_label.items():
        figures = [_figure(list(runs.values()), name) for name in FIGURES]
        against = [interval_cell(paired_advantages(runs, by_label.get(base, {}))) for base in BASES]
        lines.append(f"| {' | '.join([label, str(len(runs)), *figures, *against])} |")
    return "\n".join(lines)


def _figure(runs: Sequence[Record], name: str) -> str:
    known = [run[name] for run in runs if run[name] is not None]
    return f"{mean(known):.3f}" if known else "–"
