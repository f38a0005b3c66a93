"""The benchmark's rows: a line of JSON each on stdout, and a table for a person at the end."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.metrics import Metrics, summarize

HEADER = (
    f"{'row':<24}{'engine':<9}{'measure':<14}{'median':>9}"
    "  [min, max], TTFT p50, share of limit, failed"
)


class Report:
    """Writes each row when it is added, and keeps it for the table.

    Args:
        origin: what every row states: commit, hardware, versions.
    """

    def __init__(self, origin: Mapping[str, Any]) -> None:
        self._origin = origin
        self._rows: list[dict[str, Any]] = []

    @property
    def has_failures(self) -> bool:
        """Whether any request of any row failed."""
        return any(row["failed"] for row in self._rows)

    def add(
        self, name: str, engine: str, measure: str, repetitions: Sequence[Metrics], **details: Any
    ) -> None:
        """Add a row and write it.

        Args:
            name: name of the row.
            engine: name of the engine.
            measure: the figure that the row is about.
            repetitions: the figures of each repetition, with the same keys. The row has their
                median, minimum and maximum, and the sum of `failed`.
            details: further fields. With `limit`, in the unit of `measure`, the row also has
                `share_of_limit`.
        """
        row: dict[str, Any] = {
            "row": name,
            "engine": engine,
            "measure": measure,
            "repetitions": len(repetitions),
        }
        for key in repetitions[0]:
            row[key] = summarize([metrics[key] for metrics in repetitions])
        row["failed"] = sum(metrics.get("failed") or 0 for metrics in repetitions)
        row |= details
        row |= self._origin
        if "limit" in details and row[measure]:
            row["share_of_limit"] = round(row[measure]["median"] / details["limit"], 3)
        self._rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    def table(self) -> str:
        """The rows, aligned, for a person to read."""
        lines = [HEADER, *map(_table_line, self._rows)]
        return "\n".join(lines) + "\n"


def _table_line(row: Mapping[str, Any]) -> str:
    about = row[row["measure"]] or {}
    ttft = row.get("ttft_p50_s") or {}
    names = f"{row['row']:<24}{row['engine']:<9}{row['measure']:<14}"
    spread = f"{about.get('median', '-'):>9}  [{about.get('min')}, {about.get('max')}]"
    rest = f"{ttft.get('median', '-')}  {row.get('share_of_limit', '-')}  {row['failed']}"
    return f"{names}{spread}  {rest}"
