"""The report of an ablation as lines for a person."""

from collections.abc import Mapping
from typing import Any

from crma.cli.output import interval


def table(title: str, result: Mapping[str, Any]) -> str:
    """Lay out an ablation's answer: a line per variant, then two lines per comparison."""
    lines = [f"{title}: accuracy [95 %, Wilson]"]
    for variant, row in result["variants"].items():
        if "perplexity" in row:
            perplexity = _number(row["perplexity"], ".4g")
            measured = f"perplexity {perplexity}, averaged over {row['scored']} answers"
        else:
            accuracy = _number(row["accuracy"], ".2f")
            counts = f"{row['correct']} of {row['scored']}"
            measured = f"{accuracy} {interval(row['wilson'])} {counts}"
        lines.append(f"{variant:<15} {measured}")
    for pair in result["comparisons"]:
        difference = _number(pair["difference"], "+.2f")
        line = f"{pair['a']} - {pair['b']}: {difference} {interval(pair['bootstrap'])}"
        flips = pair.get("mcnemar")
        if flips is not None:
            p = _number(flips["p"], ".2g")
            line += f", gained {flips['gained']}, lost {flips['lost']}, p = {p}"
        lines += [line, f"  {_power(pair)}"]
    return "\n".join(lines)


def _power(pair: Mapping[str, Any]) -> str:
    """What so many questions can show, in a sentence."""
    smallest = pair["detectable_difference"]
    if smallest is None:
        return f"{pair['n']} questions are too few to find any difference"
    seen = f"a difference of {smallest:.2g}"
    return f"80 of 100 runs of {pair['n']} questions would see {seen}; a smaller one may be missed"


def _number(value: float | None, form: str) -> str:
    """Format a number, or a dash for one that too few items leave undefined."""
    return "–" if value is None else format(value, form)
