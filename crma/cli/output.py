"""What commands print: results to stdout, everything else to stderr."""

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> "Console":
    """Stderr as rich writes to it: without colours if NO_COLOR is set or it is no terminal."""
    from rich.console import Console  # here, because `--help` does not need it

    return Console(stderr=True, highlight=False, soft_wrap=True)


def be_quiet(quiet: bool) -> None:
    """Whether `note` and bars of progress print nothing from now on."""
    console().quiet = quiet


def note(text: str, style: str = "") -> None:
    """Print a line about the progress of a command, as it is, in one of rich's styles."""
    console().print(text, style=style, markup=False)


def print_json(value: Any) -> None:
    """Print a result as JSON. Raises ValueError if it holds NaN or infinity."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def interval(bounds: list[float] | None) -> str:
    """An interval as "[low, high]"; a dash if there is none."""
    if bounds is None:
        return "–"
    low, high = bounds
    return f"[{low:.2f}, {high:.2f}]"


def cell(value: Any) -> str:
    """A value in a table: a dash for none, and a list with commas."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as lines in which each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
