"""The benchmark's rows: a line of JSON each on stdout, and two tables for a person at the end."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.goals import Goal
from bench.metrics import Metrics, summarize

HEADER = (
    f"{'row':<24}{'engine':<15}{'kernel, type':<21}{'measure':<14}{'median':>9}"
    "  [min, max], TTFT p50, share of limit, load average, failed"
)
GOALS_HEADER = f"{'goal':<48}{'must':>6}{'aim':>6}{'found':>9}  must, aim"


class Report:
    """Writes each row when it is added, and keeps it for the tables.

    Args:
        origin: what every row states: commit, hardware, versions.
    """

    def __init__(self, origin: Mapping[str, Any]) -> None:
        self._origin = origin
        self._rows: list[dict[str, Any]] = []
        self._goals: list[dict[str, Any]] = []

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
            "load_average": _load_average(),
        }
        for key in repetitions[0]:
            row[key] = summarize([metrics[key] for metrics in repetitions])
        row["failed"] = sum(metrics.get("failed") or 0 for metrics in repetitions)
        row |= details
        row |= self._origin
        if "limit" in details and row[measure]:
            row["share_of_limit"] = round(row[measure]["median"] / details["limit"], 3)
        self._rows.append(row)
        _write(row)

    def add_goal(self, goal: Goal, found: Sequence[float | None]) -> None:
        """Add what was found of a goal in each repetition, and write it.

        `reached` is "aim", "must" or "no" by the median; null where nothing was measured.
        """
        summary = summarize(found)
        reached = None
        if summary is not None:
            reached = "no"
            if summary["median"] >= goal.must:
                reached = "must"
            if summary["median"] >= goal.aim:
                reached = "aim"
        row = {
            "goal": goal.label,
            "must": goal.must,
            "aim": goal.aim,
            "found": summary,
            "reached": reached,
            "load_average": _load_average(),
            **self._origin,
        }
        self._goals.append(row)
        _write(row)

    def table(self) -> str:
        """The rows, aligned, for a person to read."""
        lines = [self._machine(), HEADER, *map(_table_line, self._rows)]
        return "\n".join(lines) + "\n"

    def goals_table(self) -> str:
        """The goals, likewise."""
        lines = [GOALS_HEADER, *map(_goal_line, self._goals)]
        return "\n".join(lines) + "\n"

    def _machine(self) -> str:
        hardware: Mapping[str, Any] = self._origin.get("hardware", {})
        isa = ", ".join(hardware.get("isa", ()))
        commit = self._origin.get("commit")
        return f"{hardware.get('cores')} cores of {hardware.get('cpu')}: {isa}; commit {commit}"


def _load_average() -> dict[str, float] | None:
    return summarize([os.getloadavg()[0]])


def _write(row: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def _table_line(row: Mapping[str, Any]) -> str:
    about = row[row["measure"]] or {}
    ttft = row.get("ttft_p50_s") or {}
    computing = f"{row.get('kernel') or '-'}, {row.get('dtype') or '-'}"
    names = f"{row['row']:<24}{row['engine']:<15}{computing:<21}{row['measure']:<14}"
    spread = f"{about.get('median', '-'):>9}  [{about.get('min')}, {about.get('max')}]"
    load = row["load_average"]["median"]
    share = row.get("share_of_limit", "-")
    return f"{names}{spread}  {ttft.get('median', '-')}  {share}  {load}  {row['failed']}"


def _goal_line(row: Mapping[str, Any]) -> str:
    found = "-" if row["found"] is None else row["found"]["median"]
    answers = {None: "-, -", "no": "no, no", "must": "yes, no", "aim": "yes, yes"}
    figures = f"{row['must']:>6}{row['aim']:>6}{found:>9}"
    return f"{row['goal']:<48}{figures}  {answers[row['reached']]}"
