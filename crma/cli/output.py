"""What commands print: results to stdout, everything else to stderr."""

import json
from typing import Any

import typer
from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)
note = console.print  # prints one line about the progress of a command


def show_json(value: Any) -> None:
    """Print a result as JSON. Raises ValueError if it holds NaN or infinity."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def interval(bounds: list[float] | None) -> str:
    """An interval as "[low, high]"; a dash if there is none."""
    if bounds is None:
        return "–"
    low, high = bounds
    return f"[{low:.2f}, {high:.2f}]"
