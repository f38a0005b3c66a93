"""Results as the Markdown that the README shows; a test holds the README to it."""

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "task+crma": "LoRA + CRMA",
    "task": "same LoRA, CRMA off",
    "crma": "CRMA alone",
    "base": "base",
    "control": "LoRA without CRMA",
    "naive_bayes": "naive Bayes",
    "majority": "majority",
}


def results_table(result: Mapping[str, Any]) -> str:
    """What `crma evaluate --json` gave: accuracy with its 95 % interval, and loss where there is one."""
    tasks: Mapping[str, Mapping[str, Any]] = result["tasks"]
    columns = [column for column in COLUMNS if column in next(iter(tasks.values()))]
    lines = [
        "| " + " | ".join([f"{result['split']}", *(COLUMNS[column] for column in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
        *("| " + " | ".join([task, *(_cell(row[column]) for column in columns)]) + " |" for task, row in tasks.items()),
    ]
    items = next(iter(tasks.values()))[columns[0]]["items"]
    machine = result["hardware"]
    origin = (
        f"Exact-match accuracy on {items} questions a task [95 %, Wilson], with the loss in nats per answer token. "
        f"{result['model']}, {result['dtype']}, greedy; seed {result['seed']}, one run; {machine['cores']} cores of "
        f"{machine['cpu']}; commit `{result['commit']}`."
    )
    return "\n".join([*lines, "", origin])


def _cell(cell: Mapping[str, Any]) -> str:
    low, high = cell["wilson"]
    loss = f"<br>{cell['loss']:.2f}" if "loss" in cell else ""
    return f"{cell['accuracy']:.2f} [{low:.2f}, {high:.2f}]{loss}"
