"""What commands print: results on stdout, everything else on stderr."""

import json
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False, soft_wrap=True)
note = console.print  # a line about what is going on


def show_json(value: Any) -> None:
    """The whole result."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def progress_bars() -> Progress:
    """Bars on standard error, with the time they took and will take."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console)


def interval(bounds: list[float] | None) -> str:
    """[low, high], or a dash."""
    return "–" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"
